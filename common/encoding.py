"""Columns to features: declared ranges scaled to [-1, 1], vocabularies one-hot, and an intercept.

The second moment S of the features is public. For a user's table it follows from the declarations alone: a
numeric column is taken as uniform on its range (1/3), a word as uniform on its vocabulary (1/length), the
intercept is 1, and columns as uncorrelated. For a table of public items it is the mean of x x' over the
items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import FeatureConfig
from common.errors import DataError
from common.model import Array
from common.tables import (
    Cells,
    Check,
    as_numbers,
    as_texts,
    column_names,
    completeness,
    describe_bad_rows,
    number_check,
    read_cells,
    text_check,
)

INTERCEPT = "intercept"
_UNIFORM_SECOND_MOMENT = 1 / 3
_MAX_CATALOGUE = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Features made of columns.

    Attributes:
        names: `d` names, the intercept last.
        X: `N x d`, in [-1, 1]; rows that fail a check are zero in that column.
        checks: What was wrong with the cells.
        num_clipped: How many numbers lay outside their declared range.
        declared_moment: `d`, the diagonal of S that follows from the declarations.
    """

    names: tuple[str, ...]
    X: Array
    checks: tuple[Check, ...]
    num_clipped: int
    declared_moment: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemTable:
    """The public features of items.

    Attributes:
        index: Item id to its row.
        table: `I x d`, entries in [-1, 1].
        names: `d` feature names.
        second_moment: `d x d` matrix S.
    """

    index: Mapping[str, int]
    table: Array
    names: tuple[str, ...]
    second_moment: Array


def encode_features(columns: Mapping[str, Sequence[Any]], features: Sequence[FeatureConfig]) -> Encoded:
    """Encode the declared columns in the declared order and add the intercept."""
    parts = [_encode(columns[feature.name], feature) for feature in features]
    num_rows = len(next(iter(columns.values())))
    return Encoded(
        names=(*(name for part in parts for name in part.names), INTERCEPT),
        X=np.concatenate([*(part.X for part in parts), np.ones((num_rows, 1))], axis=1),
        checks=tuple(check for part in parts for check in part.checks),
        num_clipped=sum(part.num_clipped for part in parts),
        declared_moment=np.concatenate([*(part.declared_moment for part in parts), np.ones(1)]),
    )


def item_table(ids: Sequence[str], table: Array, names: tuple[str, ...]) -> ItemTable:
    """An item table whose S is the mean of x x' over the items, all with the same weight."""
    index = {item: row for row, item in enumerate(ids)}
    return ItemTable(index=index, table=table, names=names, second_moment=table.T @ table / len(ids))


def read_item_features(path: Path, item: str, features: Sequence[FeatureConfig]) -> ItemTable:
    """A CSV of public item features; without `features` every column but the item's, as numbers.

    A numeric column without a declared range is divided by its largest magnitude: the table is public.

    Raises:
        DataError: Naming the file, the row and the column of the first bad cell.
    """
    known = column_names(path)
    chosen = features or [FeatureConfig(name=name) for name in known if name != item]
    cells = read_cells(path, [item, *(feature.name for feature in chosen)])
    ids = as_texts(cells.columns[item])
    encoded = encode_features(cells.columns, [_with_range(feature, cells) for feature in chosen])
    first = {text: row for row, text in reversed(list(enumerate(ids)))}
    repeated = np.array([first[text] != row for row, text in enumerate(ids)])
    checks = [
        completeness(cells, known),
        text_check(item, ids),
        Check(column=item, expected="an item that no row above has", bad=repeated),
        *encoded.checks,
    ]
    if bad := describe_bad_rows(cells, checks, limit=1):
        raise DataError(f"{bad[0]} Public item tables must be complete.")
    return item_table(ids, encoded.X, encoded.names)


def read_catalogue(path: Path) -> ItemTable:
    """A public list of item ids, one a line: x = [one-hot of the item, 1].

    S = diag(1/I, ..., 1/I, 1): the intercept is the sum of the one-hots, so the cross moments would only make
    S singular.

    Raises:
        DataError: If the list is missing, empty, repeats an item or is too long to be dense.
    """
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: Expected a readable list of item ids, got {type(error).__name__}.") from error
    if not ids or len(set(ids)) < len(ids):
        raise DataError(f"{path.name}: Expected different item ids, one a line, got a list with {len(ids)} lines.")
    if len(ids) > _MAX_CATALOGUE:
        raise DataError(
            f"{path.name}: Expected at most {_MAX_CATALOGUE} items, got {len(ids)}: larger catalogues are "
            "not supported yet. Declare data.item_features instead, or leave rare items out."
        )
    count = len(ids)
    table = np.concatenate([np.eye(count), np.ones((count, 1))], axis=1)
    moment = np.diag([*[1 / count] * count, 1.0])
    names = (*(f"item={item}" for item in ids), INTERCEPT)
    index = {item: row for row, item in enumerate(ids)}
    return ItemTable(index=index, table=table, names=names, second_moment=moment)


def _encode(values: Sequence[Any], feature: FeatureConfig) -> Encoded:
    return _encode_number(values, feature) if feature.values is None else _encode_word(values, feature)


def _encode_number(values: Sequence[Any], feature: FeatureConfig) -> Encoded:
    numbers = as_numbers(values)
    low, high = (-1.0, 1.0) if feature.low is None or feature.high is None else (feature.low, feature.high)
    clipped = np.clip(numbers, low, high)
    scaled = (clipped - (high / 2 + low / 2)) / (high / 2 - low / 2)
    return Encoded(
        names=(feature.name,),
        X=np.nan_to_num(np.clip(scaled, -1, 1))[:, None],
        checks=(number_check(feature.name, numbers),),
        num_clipped=int(((numbers < low) | (numbers > high)).sum()),
        declared_moment=np.array([_UNIFORM_SECOND_MOMENT]),
    )


def _encode_word(values: Sequence[Any], feature: FeatureConfig) -> Encoded:
    vocabulary = feature.values or ()
    hot = _one_hot(as_texts(values), vocabulary)
    expected = "a word of its declared vocabulary"
    return Encoded(
        names=tuple(f"{feature.name}={word}" for word in vocabulary),
        X=hot,
        checks=(Check(column=feature.name, expected=expected, bad=hot.sum(axis=1) == 0),),
        num_clipped=0,
        declared_moment=np.full(len(vocabulary), 1 / len(vocabulary)),
    )


def _one_hot(texts: Sequence[str], values: Sequence[str]) -> Array:
    index = {value: column for column, value in enumerate(values)}
    codes = np.array([index.get(text, -1) for text in texts], dtype=np.int64)
    hot = np.zeros((len(texts), len(values)))
    rows = np.flatnonzero(codes >= 0)
    hot[rows, codes[rows]] = 1.0
    return hot


def _with_range(feature: FeatureConfig, cells: Cells) -> FeatureConfig:
    if feature.values is not None or feature.low is not None:
        return feature
    largest = float(np.nanmax(np.abs(as_numbers(cells.columns[feature.name])), initial=0.0)) or 1.0
    return feature.model_copy(update={"low": -largest, "high": largest})
