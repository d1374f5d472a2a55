"""The MovieLens folders: what a movie is worth knowing by, from the public list of movies alone.

Features of a movie: its genres divided by the square root of how many it has, the decade of the year in its
title (all before 1940 as one), and an intercept. That makes 18 + 8 + 1 = 27 for MovieLens 1M and
19 + 7 + 1 = 27 for MovieLens 100K.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.encoding import INTERCEPT, ItemTable, item_table
from common.errors import DataError
from common.model import Array
from common.tables import Layout, column_names, read_cells

TARGET_RANGE = (1.0, 5.0)
TARGET_OFFSET = 3.5

_RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_FIRST_DECADE = 1930
_YEAR = re.compile(r"\((\d{4})\)")
# The order of the flags in u.item, from the README of MovieLens 100K.
_GENRES_100K = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Where a MovieLens folder keeps its ratings and movies.

    Attributes:
        ratings: The file with ratings.
        layout: Of that file; None where it is CSV with a header.
        movies: The file with movies.
    """

    ratings: str
    layout: Layout | None
    movies: str


PRESETS: dict[str, tuple[Preset, ...]] = {
    "movielens-1m": (
        Preset(ratings="ratings.csv", layout=None, movies="movies.dat"),
        Preset(
            ratings="ratings.dat",
            layout=Layout(delimiter="::", quoted=False, header=_RATING_COLUMNS),
            movies="movies.dat",
        ),
    ),
    "movielens-100k": (
        Preset(
            ratings="u.data",
            layout=Layout(delimiter="\t", quoted=False, header=_RATING_COLUMNS),
            movies="u.item",
        ),
    ),
}


def find_preset(folder: Path, name: str) -> tuple[str, Preset]:
    """The preset `name` ("auto" for any) whose files are in `folder`.

    Raises:
        DataError: If no preset has all its files there; the message lists what was looked for.
    """
    names = list(PRESETS) if name == "auto" else [name]
    for candidate in names:
        for preset in PRESETS[candidate]:
            if (folder / preset.ratings).is_file() and (folder / preset.movies).is_file():
                return candidate, preset
    looked_for = "; ".join(
        f"{preset.ratings} and {preset.movies} ({candidate})" for candidate in names for preset in PRESETS[candidate]
    )
    raise DataError(f"Expected one of these pairs of files in data.source={folder}, got none: {looked_for}.")


def find_movies(folder: Path, name: str) -> Path:
    """The public list of movies of the preset `name` ("auto" for any), whether ratings lie beside it or not.

    Raises:
        DataError: If there is none; the message lists what was looked for.
    """
    files = [preset.movies for candidate in (PRESETS if name == "auto" else [name]) for preset in PRESETS[candidate]]
    for file in dict.fromkeys(files):
        if (folder / file).is_file():
            return folder / file
    looked_for = " or ".join(dict.fromkeys(files))
    raise DataError(f"Expected the public list of movies in data.source={folder}, got none: {looked_for}.")


def read_movies(path: Path) -> ItemTable:
    """The public features of every movie in `movies.dat` or `u.item`.

    Raises:
        DataError: Naming file and row of the first movie that cannot be read.
    """
    delimiter, header = ("|", _columns_100k()) if path.name == "u.item" else ("::", ("id", "title", "genres"))
    layout = Layout(delimiter=delimiter, quoted=False, header=header, encoding="latin-1")
    cells = read_cells(path, column_names(path, layout=layout), layout=layout)
    if not cells.complete.all():
        row = cells.rows[np.argmin(cells.complete)]
        raise DataError(f"{path.name}, row {row}: Expected {len(header)} fields separated by {delimiter!r}.")
    if "genres" in header:
        genres = [frozenset(text.split("|")) for text in cells.columns["genres"]]
        vocabulary = tuple(sorted(frozenset().union(*genres)))
        flags = np.array([[genre in own for genre in vocabulary] for own in genres], dtype=np.float64)
    else:
        vocabulary = _GENRES_100K
        flags = np.array([[flag == "1" for flag in cells.columns[genre]] for genre in vocabulary]).T.astype(float)
    if len(set(cells.columns["id"])) < len(flags):
        raise DataError(f"{path.name}: Expected every movie once, got one twice.")
    decades, names = _decades(cells.columns["title"])
    table = np.concatenate([_normalised(flags), decades, np.ones((len(flags), 1))], axis=1)
    return item_table(list(cells.columns["id"]), table, (*vocabulary, *names, INTERCEPT))


def _columns_100k() -> tuple[str, ...]:
    return ("id", "title", "released", "video", "url", *_GENRES_100K)


def _normalised(flags: Array) -> Array:
    return np.asarray(flags / np.sqrt(np.maximum(flags.sum(axis=1, keepdims=True), 1)))


def _decades(titles: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """One-hot decades that occur; a title without a year has none."""
    years = [_YEAR.findall(title) for title in titles]
    decade = np.array([max(int(found[-1]) // 10 * 10, _FIRST_DECADE) if found else 0 for found in years])
    occurring = np.unique(decade[decade > 0])
    names = tuple("before 1940" if d == _FIRST_DECADE else f"{d}s" for d in occurring)
    return (decade[:, None] == occurring).astype(np.float64), names
