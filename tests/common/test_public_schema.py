"""The schema that a server makes without any user's row is the one that every node has."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import DataConfig, FeatureConfig, SyntheticConfig
from common.data import DataSchema
from common.errors import DataError
from common.loading import load, public_schema

FEATURES = (
    FeatureConfig(name="age", low=20, high=60),
    FeatureConfig(name="kind", values=("web", "shop")),
    FeatureConfig(name="spend"),
)
MOVIES = "1::Toy Story (1995)::Animation|Comedy\n2::2001 (1926)::Sci-Fi\n9::Caf\xe9 (1931)::Drama\n"
ITEM_100K = "{id}|Film (19{id}0)|01-Jan-1990||http://x|" + "|".join("0" * 18) + "|1\n"


def table(folder: Path) -> DataConfig:
    (folder / "rows").write_text("user,age,kind,spend,y\nann,20,web,0.5,1\nbob,60,shop,2.0,5\n")
    return DataConfig(source=str(folder / "rows"), format="table", features=FEATURES, target_range=(1.0, 5.0))


def undeclared_format(folder: Path) -> DataConfig:
    return table(folder).model_copy(update={"format": "auto", "target_offset": 2.0})


def item_features(folder: Path) -> DataConfig:
    (folder / "items.csv").write_text("item,size,colour\nx,-4,3\ny,2,1\n")
    (folder / "rows").write_text("user,item,rating\nann,x,4\nbob,y,2\n")
    return DataConfig(
        source=str(folder / "rows"), item_features=str(folder / "items.csv"), target_range=(0.0, 5.0), format="ratings"
    )


def catalogue(folder: Path) -> DataConfig:
    (folder / "items.txt").write_text("x\ny\nz\n")
    (folder / "rows").write_text("user,item,rating\nann,x,4\nbob,y,2\n")
    return DataConfig(source=str(folder / "rows"), catalogue=str(folder / "items.txt"), target_range=(0.0, 5.0))


def movielens_1m(folder: Path) -> DataConfig:
    (folder / "movies.dat").write_text(MOVIES, encoding="latin-1")
    (folder / "ratings.csv").write_text("user_id,item_id,rating\n1,1,5\n2,9,1\n")
    return DataConfig(source=str(folder))


def movielens_100k(folder: Path) -> DataConfig:
    (folder / "u.item").write_text("".join(ITEM_100K.format(id=i) for i in (5, 7)), encoding="latin-1")
    (folder / "u.data").write_text("1\t5\t4\t881250949\n2\t7\t3\t881250949\n")
    return DataConfig(source=str(folder), format="movielens-100k")


def synthetic(folder: Path) -> DataConfig:
    del folder
    drawn = SyntheticConfig(users=5, examples=3, dimension=4, rank=2, sparsity=1, noise=0.7, U_scale=2.0)
    return DataConfig(synthetic=drawn)


def assert_equal(one: DataSchema, other: DataSchema) -> None:
    assert one.feature_names == other.feature_names
    assert one.feature_second_moment.tolist() == other.feature_second_moment.tolist()
    assert (one.target_range, one.target_offset) == (other.target_range, other.target_offset)
    assert one.feature_bound == other.feature_bound


@pytest.mark.parametrize(
    "made",
    [table, undeclared_format, item_features, catalogue, movielens_1m, movielens_100k, synthetic],
    ids=lambda made: str(made.__name__),
)
def test_the_schema_needs_no_rows(made: Callable[[Path], DataConfig], tmp_path: Path) -> None:
    """It is what `load` gives, for every format, and stays so when the users' rows are gone."""
    data = made(tmp_path)
    loaded = load(data).schema
    for name in ("rows", "ratings.csv", "u.data"):
        (tmp_path / name).unlink(missing_ok=True)
    assert_equal(public_schema(data), loaded)


def test_the_schema_of_likes_needs_no_range(tmp_path: Path) -> None:
    """A logistic loss has targets 0 and 1 in both."""
    data = table(tmp_path).model_copy(update={"target_range": None})
    (tmp_path / "rows").write_text("user,age,kind,spend,y\nann,20,web,0.5,1\n")
    assert_equal(public_schema(data, "logistic"), load(data, "logistic").schema)
    assert_equal(public_schema(synthetic(tmp_path), "logistic"), load(synthetic(tmp_path), "logistic").schema)


@pytest.mark.parametrize(
    ("changes", "family", "says"),
    [
        ({"features": ()}, "squared", "data.features"),
        ({"target_range": None}, "squared", "data.target_range"),
        ({"format": "movielens-1m"}, "squared", "movies.dat"),
        ({"format": "movielens-1m"}, "logistic", "model.family"),
        ({"format": "ratings"}, "squared", "data.catalogue"),
    ],
)
def test_what_is_not_declared_is_named(changes: dict[str, object], family: str, says: str, tmp_path: Path) -> None:
    """Nothing is looked up in users' rows instead."""
    data = table(tmp_path).model_copy(update=changes)
    with pytest.raises(DataError, match=says):
        public_schema(data, family)  # type: ignore[arg-type]
