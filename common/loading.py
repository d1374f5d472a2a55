"""From a configured source to a population and its public schema: the only place that knows the formats.

Bad rows are named with file, row and column, never with the value. A bad row is its user's: it is dropped, and the
user stays, if need be without examples, so that who is in the population never depends on what a row holds. What is
public (items, ranges and vocabularies) comes from the configuration or from public files and never from pooling
users' rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from common.config import DataConfig, Family
from common.data import (
    DataSchema,
    DenseFeatures,
    Features,
    ItemFeatures,
    KeyArray,
    Population,
    example_keys,
    limit_examples,
    row_hashes,
    shared_keys,
    text_hashes,
)
from common.encoding import ItemTable, encode_features, read_catalogue, read_item_features
from common.errors import DataError
from common.model import Array, IntArray
from common.movielens import TARGET_OFFSET, TARGET_RANGE, find_movies, find_preset, read_movies
from common.synthetic import SyntheticTruth, draw_population, synthetic_schema
from common.tables import (
    BoolArray,
    Cells,
    Check,
    Layout,
    NoRows,
    as_numbers,
    as_texts,
    as_times,
    bad_rows,
    column_names,
    completeness,
    describe_bad_rows,
    describe_columns,
    number_check,
    read_cells,
    text_check,
)

ONE_USER = ""
"""`data.user` of a device whose table has no column of users, as all rows are its owner's."""
_OWNER = "owner"
_SHOWN_BAD_ROWS = 20
_ALIASES = {
    "user": ("user", "user_id", "userId"),
    "item": ("item", "item_id", "itemId", "movieId"),
    "target": ("target", "y", "label", "rating"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """What was read.

    Attributes:
        population: The users and their examples.
        schema: What is public about them.
        format: How the source was read, after "auto".
        bad_rows: One line for each of the first bad rows that were dropped.
        num_bad_rows: How many rows were dropped.
        num_clipped: How many targets and features lay outside their declared range and were clipped to it.
        truth: The parameters behind a synthetic population.
    """

    population: Population
    schema: DataSchema
    format: str
    bad_rows: tuple[str, ...] = ()
    num_bad_rows: int = 0
    num_clipped: int = 0
    truth: SyntheticTruth | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The columns every format has, before bad rows are dropped; all of length N."""

    cells: Cells
    users: list[str]
    target: Array
    weight: Array | None
    time: Array | None
    event: list[str] | None
    split_by: list[str] | None
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Examples:
    """What the format makes of the other columns; features and hashes of length N."""

    features: Features
    item_hash: KeyArray | None
    names: tuple[str, ...]
    second_moment: Array
    checks: tuple[Check, ...]
    num_clipped: int = 0


def load(data: DataConfig, family: Family = "squared") -> Loaded:
    """Read the source that the configuration names.

    Args:
        data: The section `data`.
        family: The loss: `squared` needs a declared range of the target, `logistic` targets 0 and 1, `softmax` a
            declared range [0, C - 1] of whole numbers.

    Returns:
        The population, with at most `max_examples` of each user, and its schema.

    Raises:
        DataError: If a file, column or declaration is missing, or a row is bad and `on_bad_rows` is "error".
    """
    loaded = _load(data, family)
    if data.on_bad_rows == "error":
        refuse_bad_rows(loaded.bad_rows, loaded.num_bad_rows)
    return loaded


def public_schema(data: DataConfig, family: Family = "squared") -> DataSchema:
    """The schema that `load` gives on every node with this configuration, without reading any user's row.

    It follows from the declarations and from public files: the list of items or movies. What holds the users' rows
    need not exist here.

    Args:
        data: The section `data`.
        family: The loss.

    Raises:
        DataError: If a declaration or a public file is missing.
    """
    path = Path(data.source)
    _refuse_split_column(path, data)
    if data.source == "synthetic":
        drawn = data.synthetic.model_dump(exclude={"users", "examples", "seed", "precision"})
        return synthetic_schema(**drawn, family=_linear(family))
    if _is_movielens(path, data):
        declared = _declared_movielens(data, family)
        items = read_movies(find_movies(path, data.format))
        return _schema(items.names, items.second_moment, declared, family)
    if _is_ratings(data):
        items = _public_items(data)
        return _schema(items.names, items.second_moment, data, family)
    if not data.features:
        raise DataError(
            "Expected data.features, the columns to learn from with their public ranges, got none. Declare them, or "
            "data.item_features or data.catalogue for ratings."
        )
    encoded = encode_features({feature.name: [] for feature in data.features}, data.features)
    return _schema(encoded.names, np.diag(encoded.declared_moment), data, family)


class InputEncoder:
    """Makes features of cells as they are declared for the training data; a public list of items is read once."""

    def __init__(self, data: DataConfig) -> None:
        """Read what is public.

        Args:
            data: The section `data`; its source need not exist.

        Raises:
            DataError: If a public file or a declaration is missing.
        """
        source = Path(data.source)
        movies = _is_movielens(source, data)
        if data.source == "synthetic" or not (data.features or _is_ratings(data) or movies):
            raise DataError(
                "Expected data.features, data.item_features or data.catalogue, by which an input is read, got none "
                f"with data.source={data.source!r}. Declare the columns there."
            )
        self._data, self._item = data, ""
        self._items: ItemTable | None = None
        if movies:
            self._items = read_movies(find_movies(source, data.format))
        elif _is_ratings(data):
            self._items = _public_items(data)

    def columns(self, known: Sequence[str], path: Path) -> list[str]:
        """Which of the columns of `path` it needs.

        Raises:
            DataError: If `known` has none for the items.
        """
        if self._items is None:
            return [feature.name for feature in self._data.features]
        self._item = _column("item", self._data.item, known, path)
        return [self._item]

    def encode(self, cells: Cells) -> tuple[Array, tuple[Check, ...], int]:
        """`N x d` features, what is wrong with them, and how many numbers lay outside their declared range."""
        if self._items is None:
            encoded = encode_features(cells.columns, self._data.features)
            return encoded.X, encoded.checks, encoded.num_clipped
        item = np.array([self._items.index.get(name, -1) for name in as_texts(cells.columns[self._item])], np.int64)
        expected = "an item of the public list"
        return self._items.table[item], (Check(column=self._item, expected=expected, bad=item < 0),), 0


def user_column(known: Sequence[str], data: DataConfig, path: Path) -> str | None:
    """The column of users; None where all rows are the owner's of the device.

    Raises:
        DataError: If there is none.
    """
    return None if data.user == ONE_USER else _column("user", data.user, known, path)


def target_column(known: Sequence[str], data: DataConfig, path: Path) -> str:
    """The column of the target.

    Raises:
        DataError: If there is none.
    """
    return _column("target", data.target, known, path)


def users_of(cells: Cells, column: str | None) -> list[str]:
    """Whose each row is; the owner's of a device whose table has no column of users."""
    return [_OWNER] * cells.rows.size if column is None else as_texts(cells.columns[column])


def refuse_bad_rows(named: Sequence[str], count: int) -> None:
    """Raise where rows were dropped that should not have been.

    Args:
        named: From `Loaded.bad_rows`.
        count: From `Loaded.num_bad_rows`.

    Raises:
        DataError: With the first of them, unless there are none.
    """
    if not count:
        return
    more = f" {count - 1} more rows are bad." if count > 1 else ""
    remedy = 'Correct them, or set data.on_bad_rows = "skip" to drop and count them.'
    raise DataError(f"{named[0]}{more} {remedy}")


def _load(data: DataConfig, family: Family) -> Loaded:
    """As `load`, with bad rows dropped whatever `on_bad_rows` says."""
    path = Path(data.source)
    _refuse_split_column(path, data)
    if data.source == "synthetic":
        return _load_synthetic(data, family)
    if not path.exists():
        raise NoRows(f"Expected a file or folder, got data.source={data.source!r}. Correct the path.")
    if path.is_dir() and _is_movielens(path, data):
        return _load_movielens(path, data, family)
    if data.format.startswith("movielens"):
        raise DataError(f"Expected a folder for data.format={data.format!r}, got data.source={data.source!r}.")
    if _is_ratings(data):
        return _load_items(path, data, family, _public_items(data), name="ratings")
    return _load_table(path, data, family)


def _load_synthetic(data: DataConfig, family: Family) -> Loaded:
    drawn = data.synthetic
    population, schema, truth = draw_population(**drawn.model_dump(), family=_linear(family))
    population = limit_examples(population, data.max_examples)
    return Loaded(population=population, schema=schema, format="synthetic", truth=truth)


def _linear(family: Family) -> Literal["squared", "logistic"]:
    if family == "softmax":
        raise DataError(
            "Expected model.family='squared' or 'logistic' for data.source='synthetic', whose users are drawn from a "
            "linear model, got model.family='softmax'. Name a table with classes in data.source."
        )
    return family


def _refuse_split_column(path: Path, data: DataConfig) -> None:
    if data.split_column and (data.source == "synthetic" or _is_ratings(data) or _is_movielens(path, data)):
        raise DataError(
            f"Expected data.split_column for a table only, got data.split_column={data.split_column!r} with "
            f"data.source={data.source!r}. Leave it out, for a rating is held out by its user and item, or write the "
            "rows as a table and declare data.features."
        )


def _is_movielens(path: Path, data: DataConfig) -> bool:
    """Whether a source is MovieLens; a folder is, unless something says that its files are tables."""
    declared = data.features or data.item_features or data.catalogue
    return data.format.startswith("movielens") or (data.format == "auto" and path.is_dir() and not declared)


def _load_movielens(folder: Path, data: DataConfig, family: Family) -> Loaded:
    declared = _declared_movielens(data, family)
    name, preset = find_preset(folder, data.format)
    items = read_movies(folder / preset.movies)
    return _load_items(folder / preset.ratings, declared, family, items, name=name, layout=preset.layout)


def _declared_movielens(data: DataConfig, family: Family) -> DataConfig:
    """The declarations with those of MovieLens where there are none."""
    if family != "squared":
        raise DataError(
            f"Expected model.family='squared' for ratings from 1 to 5, got model.family={family!r}. "
            "For likes, write a table of 0 and 1 and declare data.item_features."
        )
    return data.model_copy(
        update={
            "target_range": data.target_range or TARGET_RANGE,
            "target_offset": TARGET_OFFSET if data.target_offset is None else data.target_offset,
        }
    )


def _is_ratings(data: DataConfig) -> bool:
    return data.format == "ratings" or (data.format == "auto" and bool(data.item_features or data.catalogue))


def _public_items(data: DataConfig) -> ItemTable:
    """The items of ratings, from the public file that is declared."""
    if data.item_features:
        public = Path(data.item_features)
        item = _column("item", data.item, column_names(public), public)
        return read_item_features(public, item, data.features)
    if data.catalogue:
        return read_catalogue(Path(data.catalogue))
    raise DataError(
        "Expected data.item_features or data.catalogue for ratings, got neither. The items must come "
        "from a public list, not from what users rated: write the item ids to a file, one a line, and "
        "name it in data.catalogue."
    )


def _load_items(
    path: Path, data: DataConfig, family: Family, items: ItemTable, *, name: str, layout: Layout | None = None
) -> Loaded:
    column = _column("item", data.item, column_names(path, table=data.table, layout=layout), path)
    rows = _read_rows(path, layout, data, family, [column])
    ids = as_texts(rows.cells.columns[column])
    item = np.fromiter((items.index.get(i, -1) for i in ids), dtype=np.int32, count=len(ids))
    inputs = _Examples(
        features=ItemFeatures(item, items.table),
        item_hash=text_hashes(items.index, kind="item")[item],
        names=items.names,
        second_moment=items.second_moment,
        checks=(Check(column=column, expected="an item of the public list", bad=item < 0),),
    )
    return _assemble(rows, inputs, data, family, name)


def _load_table(path: Path, data: DataConfig, family: Family) -> Loaded:
    if not data.features:
        known = column_names(path, table=data.table)
        raise DataError(
            "Expected data.features, the columns to learn from with their public ranges, got none. "
            f"{path.name}: {describe_columns(path, known, _usual_names())} For ratings, declare "
            "data.item_features or data.catalogue."
        )
    rows = _read_rows(path, None, data, family, [feature.name for feature in data.features])
    encoded = encode_features(rows.cells.columns, data.features)
    inputs = _Examples(
        features=DenseFeatures(encoded.X),
        item_hash=None,
        names=encoded.names,
        second_moment=np.diag(encoded.declared_moment),
        checks=encoded.checks,
        num_clipped=encoded.num_clipped,
    )
    return _assemble(rows, inputs, data, family, "table")


def _column(role: str, declared: str | None, known: Sequence[str], path: Path) -> str:
    """The column that plays a role: the declared one, or the first of its usual names that there is."""
    candidates = (declared,) if declared else _ALIASES[role]
    for name in candidates:
        if name in known:
            return name
    raise DataError(
        f"{path.name}: Expected the {role} in a column {' or '.join(map(repr, candidates))}, got none. "
        f"Set data.{role}. {describe_columns(path, known, {*_usual_names(), *candidates})}"
    )


def _usual_names() -> set[str]:
    return {name for names in _ALIASES.values() for name in names}


def _read_rows(path: Path, layout: Layout | None, data: DataConfig, family: Family, others: Sequence[str]) -> _Rows:
    known = column_names(path, table=data.table, layout=layout)
    user = "" if data.user == ONE_USER else _column("user", data.user, known, path)
    target = _column("target", data.target, known, path)
    if target in others or user in others:
        raise DataError("Expected data.features without the columns of user and target, got one of them there.")
    optional = [name for name in (data.weight, data.timestamp, data.event_id, data.split_column) if name]
    named = [user] if user else []
    cells = read_cells(path, [*named, target, *others, *optional], table=data.table, layout=layout)
    y = as_numbers(cells.columns[target])
    users = as_texts(cells.columns[user]) if user else [_OWNER] * len(y)
    checks = [completeness(cells, known), text_check(user, users), number_check(target, y)]
    if family == "logistic":
        checks.append(Check(column=target, expected="0 or 1", bad=(y != 0) & (y != 1)))
    if family == "softmax":
        last = _last_class(data)
        bad = ~((y >= 0) & (y <= last) & (y == np.floor(y)))
        checks.append(Check(column=target, expected=f"a whole number from 0 to {last}", bad=bad))
    weight = time = event = split_by = None
    if data.weight:
        weight = as_numbers(cells.columns[data.weight])
        checks.append(Check(column=data.weight, expected="a finite number of at least 0", bad=~(weight >= 0)))
    if data.timestamp:
        time = as_times(cells.columns[data.timestamp])
        expected = "seconds or an ISO 8601 time"
        checks.append(Check(column=data.timestamp, expected=expected, bad=np.isnan(time)))
    if data.split_column:
        split_by = as_texts(cells.columns[data.split_column])
        checks.append(text_check(data.split_column, split_by))
    if data.event_id:
        event = as_texts(cells.columns[data.event_id])
        checks.append(text_check(data.event_id, event))
        checks.append(_repeated_events(data.event_id, users, event, bad_rows(cells, checks)))
    return _Rows(
        cells=cells,
        users=users,
        target=y,
        weight=weight,
        time=time,
        event=event,
        split_by=split_by,
        checks=tuple(checks),
    )


def _repeated_events(column: str, users: Sequence[str], event: Sequence[str], bad: BoolArray) -> Check:
    seen: set[tuple[str, str]] = set()
    repeated = np.zeros(len(users), dtype=np.bool_)
    for i in np.flatnonzero(~bad).tolist():
        pair = users[i], event[i]
        repeated[i] = pair in seen
        seen.add(pair)
    return Check(column=column, expected="an event that no row above of this user has", bad=repeated)


def _assemble(rows: _Rows, inputs: _Examples, data: DataConfig, family: Family, name: str) -> Loaded:
    """Drop bad rows, group the rest by user, and attach the public facts.

    Raises:
        DataError: If the target's range is not declared or no row names a user.
    """
    schema = _schema(inputs.names, inputs.second_moment, data, family)
    low, high = schema.target_range
    checks = (*rows.checks, *inputs.checks)
    bad = bad_rows(rows.cells, checks)
    named = describe_bad_rows(rows.cells, checks, limit=_SHOWN_BAD_ROWS)
    users, code = _number_users(rows.users)
    if not users:
        raise NoRows(f"{named[0]} No row names a user. Correct the file, or set data.user.")
    counts, order = _group(code, rows.time, np.flatnonzero(~bad), len(users))
    y = rows.target[order] - schema.target_offset
    user_hash = np.repeat(text_hashes(users, kind="user"), counts)
    own_keys = example_keys(user_hash, _example_hashes(rows, inputs, counts, order))
    population = Population(
        users=users,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        y=np.clip(y, low, high),
        weight=None if rows.weight is None else rows.weight[order],
        features=inputs.features.take(order),
        key=own_keys if rows.split_by is None else _shared_keys(rows.split_by, order),
    )
    return Loaded(
        population=limit_examples(population, data.max_examples, drawn_by=own_keys),
        schema=schema,
        format=name,
        bad_rows=(*rows.cells.unread, *named, *_name_users_without_rows(rows.cells, code, counts)),
        num_bad_rows=int(bad.sum()) + len(rows.cells.unread),
        num_clipped=inputs.num_clipped + int(((y < low) | (y > high)).sum()),
    )


def _schema(names: tuple[str, ...], second_moment: Array, data: DataConfig, family: Family) -> DataSchema:
    """What is public about a table or ratings.

    Raises:
        DataError: If the target's range is not declared, or not as the family needs it.
    """
    low, high, offset = _declared_target(data, family)
    return DataSchema(
        feature_names=names,
        feature_second_moment=second_moment,
        target_range=(low, high),
        target_offset=offset,
        feature_bound=1.0,
    )


def _declared_target(data: DataConfig, family: Family) -> tuple[float, float, float]:
    """Lowest and highest target after the offset, and the offset."""
    if family == "logistic":
        return 0.0, 1.0, 0.0
    if family == "softmax":
        return 0.0, float(_last_class(data)), 0.0
    if data.target_range is None:
        raise DataError(
            "Expected data.target_range, the lowest and highest target, got none. It must be declared, "
            "because computing it from users' data would cost privacy: for example target_range = [1, 5]."
        )
    low, high = data.target_range
    offset = low / 2 + high / 2 if data.target_offset is None else data.target_offset
    return low - offset, high - offset, offset


def _last_class(data: DataConfig) -> int:
    """C - 1 for the classes 0..C-1 of a softmax, from the declared range.

    Raises:
        DataError: If the range is not declared, or is not one of classes.
    """
    low, high = data.target_range or (None, None)
    if low != 0 or high is None or not high.is_integer():
        given = "none" if data.target_range is None else f"data.target_range={list(data.target_range)}"
        raise DataError(
            "Expected data.target_range=[0, C - 1], the first and the last of C classes, for model.family='softmax', "
            f"got {given}. Number the classes 0, 1, 2, ...; of ten classes it is target_range = [0, 9]."
        )
    if data.target_offset:
        raise DataError(
            "Expected no data.target_offset for model.family='softmax', whose targets are numbers of classes, got "
            f"data.target_offset={data.target_offset}. Leave it out."
        )
    return int(high)


def _number_users(names: Sequence[str]) -> tuple[tuple[str, ...], IntArray]:
    """Users by first appearance, in bad rows too, and each row's user as a number: -1 where it names none."""
    numbers: dict[str, int] = {}
    code = [numbers.setdefault(name, len(numbers)) if name else -1 for name in names]
    return tuple(numbers), np.array(code, np.int64)


def _group(code: IntArray, time: Array | None, good: IntArray, num_users: int) -> tuple[IntArray, IntArray]:
    """The users' numbers of examples, and the good rows by user and then by time."""
    code = code[good]
    order = np.argsort(code, kind="stable") if time is None else np.lexsort((time[good], code))
    return np.bincount(code, minlength=num_users), good[order]


def _name_users_without_rows(cells: Cells, code: IntArray, counts: IntArray) -> tuple[str, ...]:
    """One line about the users who are left without examples, if any."""
    without = np.flatnonzero(counts == 0)
    if not without.size:
        return ()
    row = cells.rows[np.flatnonzero(code == without[0])[0]]
    return (f"{cells.file}: {without.size} users have no usable row; the first of them is in row {row}.",)


def _example_hashes(rows: _Rows, inputs: _Examples, counts: IntArray, order: IntArray) -> KeyArray:
    """What tells a user's examples apart: the item, else the event, else the place among the user's rows."""
    if inputs.item_hash is not None:
        return inputs.item_hash[order]
    if rows.event is not None:
        return text_hashes((rows.event[i] for i in order.tolist()), kind="event")
    return row_hashes(counts)


def _shared_keys(values: Sequence[str], order: IntArray) -> KeyArray:
    """Keys by the column of the split alone; each value is hashed once, as many rows have it."""
    numbers = {value: i for i, value in enumerate(dict.fromkeys(values))}
    code = np.fromiter((numbers[value] for value in values), dtype=np.int64, count=len(values))
    return shared_keys(text_hashes(numbers, kind="split column"))[code[order]]
