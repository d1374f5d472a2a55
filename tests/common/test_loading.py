"""From files to populations: every format, what is public about it, and every bad input."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import DataConfig, FeatureConfig, SyntheticConfig
from common.data import DenseFeatures, ItemFeatures, Population, held_out, split
from common.errors import DataError
from common.loading import Loaded, load, public_schema

ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"

TABLE = """user,age,kind,spend,y
ann,20,web,0.5,1
bob,60,shop,2.0,5
ann,40,shop,-1,3
"""
FEATURES = (
    FeatureConfig(name="age", low=20, high=60),
    FeatureConfig(name="kind", values=("web", "shop", "post")),
    FeatureConfig(name="spend"),
)
MOVIES_1M = """1::Toy Story (1995)::Animation|Comedy
2::2001 (2001) (1926)::Sci-Fi
3::Brazil (1985)::Comedy
9::Caf\xe9 (1931)::Drama
"""
RATINGS_1M = "user_id,item_id,rating\n1,1,5\n1,9,1\n2,3,4\n"


def table_config(folder: Path, text: str = TABLE, **changes: Any) -> DataConfig:
    """A configuration for `text` as a CSV table."""
    path = folder / "table.csv"
    path.write_text(text)
    return DataConfig(**({"source": str(path), "features": FEATURES, "target_range": (1.0, 5.0)} | changes))


def movielens_folder(folder: Path, ratings: str = RATINGS_1M, name: str = "ratings.csv") -> DataConfig:
    """A configuration for a small folder in the layout of MovieLens 1M."""
    (folder / "movies.dat").write_text(MOVIES_1M, encoding="latin-1")
    (folder / name).write_text(ratings)
    return DataConfig(source=str(folder))


def ratings_config(folder: Path, public: str, ratings: str, **changes: Any) -> DataConfig:
    """A configuration for ratings with a public file: item features if it has columns, else a catalogue."""
    (folder / "public.csv").write_text(public)
    (folder / "ratings.csv").write_text(ratings)
    key = "item_features" if "," in public else "catalogue"
    given = {"source": str(folder / "ratings.csv"), key: str(folder / "public.csv"), "target_range": (1.0, 5.0)}
    return DataConfig(**(given | changes))


def by_user(population: Population) -> dict[str, list[list[float]]]:
    """Every user's rows of features followed by the target."""
    rows = np.column_stack([population.features.rows(slice(None)), population.y])
    bounds = population.offsets
    return {user: rows[bounds[i] : bounds[i + 1]].tolist() for i, user in enumerate(population.users)}


def test_a_table_is_scaled_by_its_declarations(tmp_path: Path) -> None:
    """Ranges go to [-1, 1], words are one-hot, an intercept is added, the middle of the target range taken off."""
    loaded = load(table_config(tmp_path))
    assert loaded.format == "table"
    assert loaded.schema.feature_names == ("age", "kind=web", "kind=shop", "kind=post", "spend", "intercept")
    assert by_user(loaded.population) == {
        "ann": [[-1, 1, 0, 0, 0.5, 1, -2], [0, 0, 1, 0, -1, 1, 0]],
        "bob": [[1, 0, 1, 0, 1, 1, 2]],
    }
    assert loaded.num_clipped == 1
    assert (loaded.schema.target_range, loaded.schema.target_offset) == ((-2.0, 2.0), 3.0)
    assert loaded.schema.feature_bound == 1.0


def test_the_second_moment_of_a_table_is_declared_not_computed(tmp_path: Path) -> None:
    """S is 1/3 for a range, 1/length for a word and 1 for the intercept, whatever the users' rows say."""
    third = 1 / 3
    expected = np.diag([third, third, third, third, third, 1])
    for text in (TABLE, "user,age,kind,spend,y\nzoe,59,post,0.9,5\n"):
        schema = load(table_config(tmp_path, text)).schema
        np.testing.assert_allclose(schema.feature_second_moment, expected)
        assert schema.target_range == (-2.0, 2.0)


def test_tables_in_every_kind_of_file_are_the_same_population(tmp_path: Path) -> None:
    """CSV, SQLite and Parquet give the same users, numbers and keys."""
    csv_config = table_config(tmp_path)
    expected = load(csv_config).population
    header, *rows = [line.split(",") for line in TABLE.splitlines()]
    typed = [(r[0], int(r[1]), r[2], float(r[3]), int(r[4])) for r in rows]
    with closing(sqlite3.connect(tmp_path / "t.db")) as connection, connection:
        connection.execute(f"CREATE TABLE t ({', '.join(header)})")
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", typed)
    sources = [tmp_path / "t.db"]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        pass
    else:
        columns = dict(zip(header, zip(*typed, strict=True), strict=True))
        parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        sources.append(tmp_path / "t.parquet")
    for source in sources:
        read = load(csv_config.model_copy(update={"source": str(source)})).population
        assert by_user(read) == by_user(expected)
        assert read.key.tolist() == expected.key.tolist()


def test_targets_outside_the_range_are_clipped_and_counted(tmp_path: Path) -> None:
    """A target above the declared range is the top of it; a declared offset replaces the middle."""
    loaded = load(table_config(tmp_path, target_range=(1.0, 4.0), target_offset=2.0))
    assert loaded.population.y.tolist() == [-1.0, 1.0, 2.0]
    assert loaded.num_clipped == 2
    assert loaded.schema.target_range == (-1.0, 2.0)


def test_logistic_targets_are_zero_or_one(tmp_path: Path) -> None:
    """The logistic family needs no range and takes no other target."""
    text = "user,age,y\na,20,1\na,30,0\nb,40,0.5\n"
    config = table_config(tmp_path, text, features=FEATURES[:1], target_range=None)
    with pytest.raises(DataError, match=r"table.csv, row 4, column 'y': Expected 0 or 1."):
        load(config, "logistic")
    loaded = load(config.model_copy(update={"on_bad_rows": "skip"}), "logistic")
    assert loaded.population.y.tolist() == [1.0, 0.0]
    assert (loaded.schema.target_range, loaded.schema.target_offset) == ((0.0, 1.0), 0.0)


def classes_config(folder: Path, *targets: object, **changes: Any) -> DataConfig:
    """A table of one user with these targets, of three classes."""
    text = "user,age,y\n" + "".join(f"a,{20 + i},{target}\n" for i, target in enumerate(targets))
    return table_config(folder, text, **({"features": FEATURES[:1], "target_range": (0.0, 2.0)} | changes))


def test_softmax_targets_are_numbers_of_classes(tmp_path: Path) -> None:
    """They come out as they are, without an offset, and what both sides agree on says how many classes there are."""
    config = classes_config(tmp_path, 2, 0, "1.0", 1)
    loaded = load(config, "softmax")
    assert loaded.population.y.tolist() == [2.0, 0.0, 1.0, 1.0]
    assert (loaded.schema.target_range, loaded.schema.target_offset) == ((0.0, 2.0), 0.0)
    assert loaded.num_clipped == 0
    assert public_schema(config, "softmax").digest == loaded.schema.digest
    more = config.model_copy(update={"target_range": (0.0, 9.0)})
    assert public_schema(more, "softmax").digest != loaded.schema.digest


@pytest.mark.parametrize("target", ["3", "-1", "0.5", "1e9", "nan", "", "cat"])
def test_a_target_that_is_no_class_is_a_bad_row(tmp_path: Path, target: str) -> None:
    """It is not cut to the nearest class: another class is another answer."""
    config = classes_config(tmp_path, 1, target, 0)
    expected = "a whole number from 0 to 2" if target[:1].isdigit() or target == "-1" else "a finite number"
    with pytest.raises(DataError, match=f"table.csv, row 3, column 'y': Expected {expected}."):
        load(config, "softmax")
    loaded = load(config.model_copy(update={"on_bad_rows": "skip"}), "softmax")
    assert loaded.population.y.tolist() == [1.0, 0.0]
    assert (loaded.num_bad_rows, loaded.num_clipped) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"target_range": None}, r"data\.target_range=\[0, C - 1\].*got none\..*target_range = \[0, 9\]"),
        ({"target_range": (1.0, 3.0)}, r"got data\.target_range=\[1\.0, 3\.0\]"),
        ({"target_range": (0.0, 2.5)}, r"got data\.target_range=\[0\.0, 2\.5\]"),
        ({"target_range": (-1.0, 1.0)}, r"got data\.target_range=\[-1\.0, 1\.0\]"),
        ({"target_offset": 1.0}, r"Expected no data\.target_offset.*got data\.target_offset=1\.0\. Leave it out"),
    ],
)
def test_classes_have_to_be_declared(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """The range of a softmax begins at 0 and ends at a whole number, for rows and for the schema alike."""
    config = classes_config(tmp_path, 1, 0, **changes)
    with pytest.raises(DataError, match=problem):
        load(config, "softmax")
    with pytest.raises(DataError, match=problem):
        public_schema(config, "softmax")


def test_softmax_has_no_synthetic_users_and_no_ratings_of_movielens(tmp_path: Path) -> None:
    """The made-up population is linear, and ratings from 1 to 5 are no classes."""
    for read in (load, public_schema):
        with pytest.raises(DataError, match=r"data\.source='synthetic'.*model\.family='softmax'"):
            read(DataConfig(), "softmax")
        with pytest.raises(DataError, match=r"Expected model\.family='squared'"):
            read(movielens_folder(tmp_path), "softmax")


def shown(folder: Path, rows: list[tuple[str, str]], **changes: Any) -> Population:
    """A table of users and images, whose feature numbers its rows."""
    text = "user,image,x,y\n" + "".join(f"{u},{image},{i / 1000},3\n" for i, (u, image) in enumerate(rows))
    features = (FeatureConfig(name="x"),)
    return load(table_config(folder, text, **({"features": features, "split_column": "image"} | changes))).population


def sides(population: Population, rows: list[tuple[str, str]], seed: int) -> dict[str, set[bool]]:
    """On which sides of the split an image is: held out, or not."""
    train, test = split(population, seed, 0.3)
    found: dict[str, set[bool]] = {}
    for part, held in ((train, False), (test, True)):
        for row in np.rint(part.features.rows(slice(None))[:, 0] * 1000).astype(int):
            found.setdefault(rows[row][1], set()).add(held)
    return found


CROWD = [(f"u{(7 * i) % 20}", f"i{(i * i) % 61}") for i in range(400)]


def test_a_split_column_holds_out_the_same_values_for_everybody(tmp_path: Path) -> None:
    """All rows of an image are on one side, whoever has them; other images are on the other."""
    population = shown(tmp_path, CROWD)
    found = sides(population, CROWD, 0)
    assert all(len(on) == 1 for on in found.values())
    assert set().union(*found.values()) == {False, True}
    one_by_one = sides(shown(tmp_path, CROWD, split_column=None), CROWD, 0)
    assert any(len(on) == 2 for on in one_by_one.values())


def test_a_split_column_does_not_look_at_the_rest_of_the_table(tmp_path: Path) -> None:
    """Another order, other users, or more rows leave an image on its side; another seed splits otherwise."""
    expected = sides(shown(tmp_path, CROWD), CROWD, 0)
    for rows in (CROWD[::-1], [(f"other{user}", image) for user, image in CROWD], [*CROWD[200:], *CROWD]):
        assert sides(shown(tmp_path, rows), rows, 0).items() <= expected.items()
    assert sides(shown(tmp_path, CROWD), CROWD, 1) != expected


def test_the_fraction_of_values_is_held_out(tmp_path: Path) -> None:
    """Of 20,000 images a fifth, within 5 sd (fails by chance with probability 6e-7); a value is read as text."""
    rows = [("a", str(i)) for i in range(20_000)]
    population = shown(tmp_path, rows, max_examples=20_000)
    assert abs(held_out(population.key, 0, 0.2).mean() - 0.2) < 5 * (0.16 / 20_000) ** 0.5
    assert shown(tmp_path, [("b", "7")]).key[0] == shown(tmp_path, [("c", " 7 ")]).key[0] == population.key[7]


def test_the_limit_of_examples_draws_from_each_users_own(tmp_path: Path) -> None:
    """With images that users share, those kept differ between users, and are what they were without the column."""
    rows = [(user, f"i{i}") for user in ("a", "b") for i in range(40)]
    with_column = shown(tmp_path, rows, max_examples=10)
    without = shown(tmp_path, rows, max_examples=10, split_column=None)
    assert with_column.features.rows(slice(None)).tolist() == without.features.rows(slice(None)).tolist()
    kept = [set(with_column.key[start : start + 10].tolist()) for start in (0, 10)]
    assert len(kept[0]) == len(kept[1]) == 10
    assert kept[0] != kept[1]


def test_an_empty_cell_of_the_split_column_is_a_bad_row(tmp_path: Path) -> None:
    """Its user stays, and so do the other rows; a column that is not there is named."""
    rows = [("a", "i1"), ("b", ""), ("a", "i2")]
    with pytest.raises(DataError, match=r"row 3, column 'image': Expected a value\."):
        shown(tmp_path, rows)
    population = shown(tmp_path, rows, on_bad_rows="skip")
    assert (population.users, population.counts.tolist()) == (("a", "b"), [2, 0])
    assert population.key.tolist() == shown(tmp_path, [rows[0], rows[2]]).key.tolist()
    with pytest.raises(DataError, match="one column 'picture', got no such column"):
        shown(tmp_path, rows, split_column="picture")


def test_only_a_table_has_a_split_column(tmp_path: Path) -> None:
    """Elsewhere what is held out is a user's item; the key and what to do instead are named."""
    ratings = ratings_config(tmp_path, "i1\ni2\n", "user,item,rating\na,i1,5\n")
    for made in (ratings, movielens_folder(tmp_path), DataConfig()):
        config = made.model_copy(update={"split_column": "item"})
        for read in (load, public_schema):
            with pytest.raises(DataError, match=r"got data\.split_column='item' with data\.source=.*Leave it out"):
                read(config)


def test_weights_and_times_are_read(tmp_path: Path) -> None:
    """A weight column becomes weights, and a user's examples are put in the order of their times."""
    text = "user,x,y,w,t\na,0.1,1,2,30\nb,0.2,1,0,5\na,0.3,1,1,2024-01-01\na,0.4,1,1,10\n"
    config = table_config(tmp_path, text, features=(FeatureConfig(name="x"),), weight="w", timestamp="t")
    population = load(config).population
    assert population.features.rows(slice(None))[:, 0].tolist() == [0.4, 0.1, 0.3, 0.2]
    assert population.weight is not None
    assert population.weight.tolist() == [1.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(("column", "cell"), [("w", "-1"), ("w", "nan"), ("t", "soon"), ("t", "")])
def test_a_bad_weight_or_time_is_a_bad_row(tmp_path: Path, column: str, cell: str) -> None:
    """Weights are at least 0 and times are times."""
    text = f"user,x,y,{column}\na,0.1,1,1\na,0.2,1,{cell}\n"
    role = {"w": "weight", "t": "timestamp"}[column]
    with pytest.raises(DataError, match=f"row 3, column '{column}': Expected"):
        load(table_config(tmp_path, text, features=(FeatureConfig(name="x"),), **{role: column}))


def test_dropped_rows_leave_the_others_with_their_users(tmp_path: Path) -> None:
    """A bad row in front shifts nobody's examples, weights or keys."""
    header, *rows = TABLE.splitlines()
    text = "\n".join([header, "eve,x,web,0,3", rows[0], "bob,x,web,0,3", *rows[1:]]) + "\n"
    expected = load(table_config(tmp_path)).population
    read = load(table_config(tmp_path, text, on_bad_rows="skip")).population
    assert by_user(read) == by_user(expected) | {"eve": []}
    assert sorted(read.key.tolist()) == sorted(expected.key.tolist())
    weighted = "user,x,y,w\neve,z,1,9\na,0.1,1,1\nb,0.2,2,2\na,0.3,3,3\n"
    features = (FeatureConfig(name="x"),)
    config = table_config(tmp_path, weighted, features=features, weight="w", on_bad_rows="skip")
    weight = load(config).population.weight
    assert weight is not None
    assert weight.tolist() == [1.0, 3.0, 2.0]


def test_a_repeated_event_of_a_user_is_a_bad_row(tmp_path: Path) -> None:
    """An event counts once; other users may use the same id, and the split goes by it, not by the row."""
    text = "user,x,y,id\na,0.1,1,e1\nb,0.2,1,e1\na,0.3,1,e2\na,0.4,1,e1\n"
    config = table_config(tmp_path, text, features=(FeatureConfig(name="x"),), event_id="id")
    with pytest.raises(DataError, match=r"row 5, column 'id': Expected an event that no row above"):
        load(config)
    first = load(config.model_copy(update={"on_bad_rows": "skip"})).population
    reordered = "user,x,y,id\na,0.3,1,e2\na,0.1,1,e1\n"
    second = load(table_config(tmp_path, reordered, features=config.features, event_id="id")).population
    assert first.key[:2].tolist() == second.key[:2].tolist()[::-1]


def test_at_most_max_examples_of_a_user_are_kept(tmp_path: Path) -> None:
    """The public limit holds for every user."""
    text = "user,x,y\n" + "a,0.1,1\n" * 9 + "b,0.1,1\n"
    population = load(table_config(tmp_path, text, features=(FeatureConfig(name="x"),), max_examples=4)).population
    assert population.counts.tolist() == [4, 1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("ann,,web,0,3", "column 'age': Expected a finite number."),
        ("ann,old,web,0,3", "column 'age': Expected a finite number."),
        ("ann,nan,web,0,3", "column 'age': Expected a finite number."),
        ("ann,inf,web,0,3", "column 'age': Expected a finite number."),
        ("ann,20,web,0,nan", "column 'y': Expected a finite number."),
        ("ann,20,web,0,", "column 'y': Expected a finite number."),
        (" ,20,web,0,3", "column 'user': Expected a value."),
        ("ann,20,fax,0,3", "column 'kind': Expected a word of its declared vocabulary."),
        ("ann,20,web,0", ": Expected 5 fields."),
        ("ann,20,web,0,3,4", ": Expected 5 fields."),
    ],
)
def test_a_bad_row_is_named_or_dropped(tmp_path: Path, line: str, problem: str) -> None:
    """Depending on `on_bad_rows`, the first bad row is an error or bad rows are dropped and counted."""
    text = TABLE + f"{line}\neve,50,web,0,4\n{line}\n"
    with pytest.raises(DataError) as caught:
        load(table_config(tmp_path, text))
    message = str(caught.value)
    assert message.startswith("table.csv, row 5")
    assert problem in message
    assert "1 more rows are bad." in message
    assert 'data.on_bad_rows = "skip"' in message
    loaded = load(table_config(tmp_path, text, on_bad_rows="skip"))
    assert loaded.num_bad_rows == 2
    assert [row.split(",")[1].split(":")[0] for row in loaded.bad_rows] == [" row 5", " row 7"]
    assert loaded.population.users == ("ann", "bob", "eve")
    assert loaded.population.num_examples == 4


def test_messages_about_rows_never_hold_a_value(tmp_path: Path) -> None:
    """What a user's cell says is not repeated."""
    text = TABLE + "secretuser,secretage,secretkind,0,3\n"
    with pytest.raises(DataError) as caught:
        load(table_config(tmp_path, text))
    skipped = load(table_config(tmp_path, text, on_bad_rows="skip"))
    assert "secret" not in str(caught.value) + "".join(skipped.bad_rows)


def test_users_without_a_usable_row_stay(tmp_path: Path) -> None:
    """A user whose every row was dropped is in the population without examples, and the row is named."""
    loaded = load(table_config(tmp_path, TABLE + "eve,x,web,0,3\nann,x,web,0,3\n", on_bad_rows="skip"))
    assert loaded.population.users == ("ann", "bob", "eve")
    assert loaded.population.counts.tolist() == [2, 1, 0]
    assert loaded.num_bad_rows == 2
    assert loaded.bad_rows[-1] == "table.csv: 1 users have no usable row; the first of them is in row 5."


def test_the_list_of_bad_rows_is_cut(tmp_path: Path) -> None:
    """Thousands of bad rows are counted, and the first twenty named."""
    loaded = load(table_config(tmp_path, TABLE + "ann,x,web,0,3\n" * 1000, on_bad_rows="skip"))
    assert loaded.num_bad_rows == 1000
    assert len(loaded.bad_rows) == 20


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"target_range": None}, r"Expected data.target_range.*target_range = \[1, 5\]"),
        ({"features": ()}, r"Expected data.features.*The columns are: user, age, kind, spend, y"),
        ({"user": "person"}, r"the user in a column 'person'.*Set data.user. The columns are: user, age"),
        ({"target": "z"}, r"the target in a column 'z'.*Set data.target"),
        ({"weight": "w"}, r"one column 'w', got no such column. The columns are: user"),
        ({"features": (FeatureConfig(name="height"),)}, r"one column 'height', got no such column"),
        ({"features": (FeatureConfig(name="y"),)}, r"without the columns of user and target"),
        ({"source": "nowhere.csv"}, r"got data.source='nowhere.csv'"),
        ({"format": "movielens-1m"}, r"Expected a folder for data.format='movielens-1m'"),
        ({"format": "ratings"}, r"Expected data.item_features or data.catalogue.*data.catalogue"),
    ],
)
def test_a_wrong_declaration_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """Missing files, columns and declarations are DataErrors with the key and a remedy."""
    with pytest.raises(DataError, match=problem):
        load(table_config(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "user,age,kind,spend,y\n"])
def test_a_table_without_rows_is_named(tmp_path: Path, text: str) -> None:
    """An empty file and a header alone are errors."""
    with pytest.raises(DataError, match=r"table.csv: Expected"):
        load(table_config(tmp_path, text))


BAD_ROWS = {
    "blank": ",,,",
    "NaN": "nan,web,nan,nan",
    "infinite": "inf,web,-inf,1e999",
    "text": "old,fax,much,good",
    "a word that is not declared": "20,fax,0,3",
    "too few fields": "20,web",
    "no fields": None,
    "too many fields": "20,web,0,3,4,5,6",
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_who_is_in_the_population_does_not_depend_on_what_rows_hold(tmp_path: Path, bad: str, place: int) -> None:
    """The users, their order and everybody else's examples stay, wherever one user's only row is bad."""
    header, *rows = TABLE.splitlines()

    def population(row: str) -> Population:
        text = "\n".join([header, *rows[:place], row, *rows[place:]]) + "\n"
        return load(table_config(tmp_path, text, on_bad_rows="skip")).population

    expected = population("eve,30,web,1,2")
    cells = BAD_ROWS[bad]
    read = population("eve" if cells is None else f"eve,{cells}")
    assert read.users == expected.users
    assert by_user(read) == by_user(expected) | {"eve": []}


def test_a_file_of_bad_rows_only_is_a_population_without_examples(tmp_path: Path) -> None:
    """Its users are known, and there is nothing to learn from; with or without item and event ids."""
    text = "user,age,kind,spend,y\nann,x,web,0,3\nann,y,web,0,3\n"
    events = "user,age,kind,spend,y,id\nann,x,web,0,3,e1\n"
    for config in (
        table_config(tmp_path, text, on_bad_rows="skip"),
        table_config(tmp_path, events, on_bad_rows="skip", event_id="id"),
        ratings_config(tmp_path, "i1\ni2\n", "user,item,rating\nann,i9,3\n", on_bad_rows="skip"),
    ):
        population = load(config).population
        assert (population.users, population.num_examples) == (("ann",), 0)
        assert [part.num_users for part in split(population, 0)] == [1, 1]


def test_a_file_in_which_no_row_names_a_user_is_an_error(tmp_path: Path) -> None:
    """Whose rows they are is not a row's business, but the file's."""
    text = "user,age,kind,spend,y\n,20,web,0,3\n"
    with pytest.raises(DataError, match=r"row 2, column 'user'.*No row names a user"):
        load(table_config(tmp_path, text, on_bad_rows="skip"))


def test_a_small_movielens_folder(tmp_path: Path) -> None:
    """Genres over the root of their number, decades with all before 1940 as one, intercept; ratings less 3.5."""
    loaded = load(movielens_folder(tmp_path))
    half = 1 / 2**0.5
    assert loaded.format == "movielens-1m"
    assert loaded.schema.feature_names == (
        *("Animation", "Comedy", "Drama", "Sci-Fi"),
        *("before 1940", "1980s", "1990s", "intercept"),
    )
    assert by_user(loaded.population) == {
        "1": [[half, half, 0, 0, 0, 0, 1, 1, 1.5], [0, 0, 1, 0, 1, 0, 0, 1, -2.5]],
        "2": [[0, 1, 0, 0, 0, 1, 0, 1, 0.5]],
    }
    assert (loaded.schema.target_range, loaded.schema.target_offset) == ((-2.5, 1.5), 3.5)
    assert isinstance(loaded.population.features, ItemFeatures)
    assert loaded.population.features.table.shape == (4, 8)


def test_the_second_moment_is_that_of_the_public_table(tmp_path: Path) -> None:
    """S counts every movie once, rated or not, so users' ratings have no part in it."""
    loaded = load(movielens_folder(tmp_path))
    assert isinstance(loaded.population.features, ItemFeatures)
    table = loaded.population.features.table
    expected = sum(np.outer(x, x) for x in table) / 4
    np.testing.assert_allclose(loaded.schema.feature_second_moment, expected)
    fewer = load(movielens_folder(tmp_path, "user_id,item_id,rating\n7,3,5\n"))
    assert np.array_equal(fewer.schema.feature_second_moment, loaded.schema.feature_second_moment)


def test_the_dat_layout_reads_like_the_csv(tmp_path: Path) -> None:
    """ratings.dat with '::' and timestamps gives the same population and keys as ratings.csv."""
    (tmp_path / "csv").mkdir()
    (tmp_path / "dat").mkdir()
    expected = load(movielens_folder(tmp_path / "csv")).population
    dat = "1::1::5::100\n1::9::1::90\n2::3::4::80\n"
    read = load(movielens_folder(tmp_path / "dat", dat, "ratings.dat")).population
    assert by_user(read) == by_user(expected)
    assert read.key.tolist() == expected.key.tolist()


def test_the_100k_layout(tmp_path: Path) -> None:
    """u.data and u.item: 19 flags, decades, intercept; a movie without year or genre has zeros there."""
    flags = ["|".join("1" if j in on else "0" for j in range(19)) for on in ({0}, {1, 18}, set())]
    movies = [
        f"1|unknown||||{flags[0]}",
        f"2|Gun (1992) (V)|01-Jan-1992||url|{flags[1]}",
        f"3|\xc9t\xe9 (1950)|||url|{flags[2]}",
    ]
    (tmp_path / "u.item").write_text("\n".join(movies) + "\n", encoding="latin-1")
    (tmp_path / "u.data").write_text("5\t2\t4\t88\n5\t1\t3\t89\n")
    loaded = load(DataConfig(source=str(tmp_path)))
    names = loaded.schema.feature_names
    assert (names[0], names[18], names[19:]) == ("unknown", "Western", ("1950s", "1990s", "intercept"))
    gun, unknown = loaded.population.features.rows(slice(None))
    assert {names[j]: gun[j] for j in np.flatnonzero(gun)} == {
        **{"Action": 1 / 2**0.5, "Western": 1 / 2**0.5},
        **{"1990s": 1.0, "intercept": 1.0},
    }
    assert {names[j]: unknown[j] for j in np.flatnonzero(unknown)} == {"unknown": 1.0, "intercept": 1.0}
    assert loaded.format == "movielens-100k"


def test_an_unknown_movie_is_a_bad_row(tmp_path: Path) -> None:
    """A rating of a movie that is not in the public list is named."""
    with pytest.raises(DataError, match=r"ratings.csv, row 5, column 'item_id': Expected an item of the public"):
        load(movielens_folder(tmp_path, RATINGS_1M + "2,77,4\n"))


@pytest.mark.parametrize(
    ("movies", "problem"),
    [
        ("1::A (1990)\n", "movies.dat, row 1: Expected 3 fields separated by '::'"),
        ("1::A (1990)::Drama\n1::B (1991)::Drama\n", "movies.dat: Expected every movie once"),
    ],
)
def test_a_broken_list_of_movies_is_named(tmp_path: Path, movies: str, problem: str) -> None:
    """The public list must be whole: its rows are never skipped."""
    config = movielens_folder(tmp_path)
    (tmp_path / "movies.dat").write_text(movies)
    with pytest.raises(DataError, match=problem):
        load(config)


@pytest.mark.parametrize("name", ["auto", "movielens-1m", "movielens-100k"])
def test_a_folder_of_something_else_lists_what_was_looked_for(tmp_path: Path, name: str) -> None:
    """Auto-detection that fails says which files it wanted."""
    with pytest.raises(DataError, match="Expected one of these pairs of files") as caught:
        load(DataConfig(source=str(tmp_path), format=name))
    assert ("u.data and u.item" in str(caught.value)) == (name != "movielens-1m")
    assert ("ratings.csv and movies.dat" in str(caught.value)) == (name != "movielens-100k")


def test_formats_and_families_that_do_not_fit_a_folder_are_named(tmp_path: Path) -> None:
    """A folder of tables has to be declared, and ratings from 1 to 5 are no yes and no."""
    config = movielens_folder(tmp_path)
    with pytest.raises(DataError, match=r"Expected model\.family='squared'"):
        load(config, "logistic")
    with pytest.raises(DataError, match=r"Expected data\.features"):
        load(config.model_copy(update={"format": "table"}))


def test_ratings_with_public_item_features(tmp_path: Path) -> None:
    """Numeric columns are divided by their largest magnitude in the public table; S is the table's."""
    ratings = "user,item,rating\na,i1,5\na,i2,3\nb,i1,1\n"
    loaded = load(ratings_config(tmp_path, "item,price,size\ni1,10,-0.5\ni2,20,0.25\ni3,-40,0\n", ratings))
    table = np.array([[0.25, -1, 1], [0.5, 0.5, 1], [-1, 0, 1]])
    assert loaded.format == "ratings"
    assert loaded.schema.feature_names == ("price", "size", "intercept")
    assert by_user(loaded.population) == {"a": [[*table[0], 2], [*table[1], 0]], "b": [[*table[0], -2]]}
    np.testing.assert_allclose(loaded.schema.feature_second_moment, table.T @ table / 3)


def test_item_columns_can_be_chosen_and_declared(tmp_path: Path) -> None:
    """data.features picks columns of the item table, with ranges or vocabularies."""
    public = "item,price,colour\ni1,10,red\ni2,20,blue\n"
    features = (FeatureConfig(name="colour", values=("blue", "red")), FeatureConfig(name="price", low=0, high=20))
    loaded = load(ratings_config(tmp_path, public, "user,item,rating\na,i2,3\n", features=features))
    assert loaded.schema.feature_names == ("colour=blue", "colour=red", "price", "intercept")
    assert by_user(loaded.population) == {"a": [[1, 0, 1, 1, 0]]}


@pytest.mark.parametrize(
    ("public", "problem"),
    [
        ("item,price\ni1,1\ni1,2\n", "public.csv, row 3, column 'item': Expected an item that no row above has"),
        ("item,price\ni1,cheap\n", "public.csv, row 2, column 'price': Expected a finite number"),
        ("item,price\n,1\n", "public.csv, row 2, column 'item': Expected a value"),
        ("item,price\ni1,1,2\n", "public.csv, row 2: Expected 2 fields"),
        ("thing,price\ni1,1\n", r"public.csv: Expected the item in a column 'item' or .*Set data.item"),
        ("i1\ni1\n", "public.csv: Expected different item ids"),
        ("\n", "public.csv: Expected different item ids"),
        ("\n".join(map(str, range(2001))), "at most 2000 items, got 2001: larger catalogues are not supported yet"),
    ],
)
def test_a_broken_public_list_is_named(tmp_path: Path, public: str, problem: str) -> None:
    """Public files must be whole, so their first bad row is an error even when bad rows are skipped."""
    with pytest.raises(DataError, match=problem):
        load(ratings_config(tmp_path, public, "user,item,rating\na,i1,3\n", on_bad_rows="skip"))


def test_ratings_with_a_catalogue_are_one_hot(tmp_path: Path) -> None:
    """x is the item's one-hot and a personal intercept; S says that items are equally likely."""
    loaded = load(ratings_config(tmp_path, "i1\ni2\n\ni3\n", "user,item,rating\na,i3,5\nb,i1,1\n"))
    assert by_user(loaded.population) == {"a": [[0, 0, 1, 1, 2]], "b": [[1, 0, 0, 1, -2]]}
    np.testing.assert_allclose(loaded.schema.feature_second_moment, np.diag([1 / 3, 1 / 3, 1 / 3, 1]))
    assert loaded.schema.feature_names == ("item=i1", "item=i2", "item=i3", "intercept")


def test_a_user_is_split_the_same_among_other_users_and_rows(tmp_path: Path) -> None:
    """By rule: what is held out of a user depends on the names of user and items only."""
    public = "\n".join(f"i{j}" for j in range(40))
    own = [f"a,i{j},3" for j in range(40)]
    others = [f"b,i{j},4" for j in range(30)]

    def held_out_items(lines: list[str]) -> set[int]:
        ratings = "\n".join(["user,item,rating", *lines])
        _, test = split(load(ratings_config(tmp_path, public, ratings)).population, 5)
        assert isinstance(test.features, ItemFeatures)
        user = test.users.index("a")
        return set(test.features.item[test.offsets[user] : test.offsets[user + 1]].tolist())

    alone = held_out_items(own)
    assert 0 < len(alone) < 40
    assert held_out_items(others + own[::-1]) == alone


def test_the_default_source_is_the_synthetic_one() -> None:
    """Without a file the population is drawn from the configured model, and the truth comes with it."""
    config = DataConfig(synthetic=SyntheticConfig(users=5, examples=(3, 8), dimension=4), max_examples=6)
    loaded = load(config)
    assert loaded.format == "synthetic"
    assert loaded.truth is not None
    assert loaded.truth.theta.shape == (5, 4)
    assert loaded.population.counts.max() <= 6
    assert isinstance(loaded.population.features, DenseFeatures)
    assert load(config, "logistic").schema.target_range == (0.0, 1.0)


def real(name: str) -> Loaded:
    """A real data set, or a skip where it is not at hand."""
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not at hand")
    return load(DataConfig(source=str(folder)))


@pytest.mark.parametrize(
    ("name", "users", "examples", "form"),
    [
        ("ml-1m-part", 5977, 359_761, "movielens-1m"),
        ("ml-100k", 943, 100_000, "movielens-100k"),
    ],
)
def test_the_real_data_sets(name: str, users: int, examples: int, form: str) -> None:
    """MovieLens loads without a bad row: 27 bounded features, targets in range, a fifth held out."""
    loaded = real(name)
    population = loaded.population
    assert (loaded.format, population.num_users, population.num_examples) == (form, users, examples)
    assert (population.dimension, loaded.num_bad_rows, loaded.num_clipped) == (27, 0, 0)
    assert set(population.y.tolist()) == {-2.5, -1.5, -0.5, 0.5, 1.5}
    assert isinstance(population.features, ItemFeatures)
    table = population.features.table
    assert np.abs(table).max() <= loaded.schema.feature_bound
    moment = loaded.schema.feature_second_moment
    np.testing.assert_allclose(moment, table.T @ table / len(table))
    assert (np.diag(moment) > 0).all()
    _, test = split(population, 0)
    # 5 sd of the binomial: fails by chance with probability 6e-7
    assert abs(test.num_examples / examples - 0.2) < 5 * (0.16 / examples) ** 0.5


def test_nothing_heavy_is_imported() -> None:
    """An edge device that loads data needs neither scipy, torch, pyarrow nor Flower."""
    heavy = "{'scipy', 'torch', 'pyarrow', 'pandas', 'flwr', 'dp_accounting'}"
    code = f"import sys, common.config, common.loading; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "options", [{}, {"features": [{"name": "age"}]}, {"user": "who", "features": [{"name": "age"}]}]
)
def test_a_file_without_a_header_keeps_its_first_row_to_itself(tmp_path, options):
    """What stands where names should is somebody's data: an error counts the fields and names none."""
    path = tmp_path / "table.csv"
    path.write_text("anna,54.48932491374359,25.5,tablet\nbert,1,2,tv\n")
    with pytest.raises(DataError, match=r"4 fields.*must be a header") as error:
        load(DataConfig(source=str(path), target_range=[0, 9], **options))
    assert not any(value in str(error.value) for value in ("anna", "54.4", "25.5", "tablet"))
