"""Simulated users with digits of their own hand, made of the 1,797 digits that come with scikit-learn.

    python examples/digits/make_data.py --users 5000 --seed 0 --out digits.parquet

Nobody wrote these: a user is simulated, and draws images with replacement from the one set that all users draw from.
What makes a user differ from others is a style, one angle that all of the user's images are turned by, and a
preference for some digits over others. An image therefore comes up again, turned otherwise, with many users: hold
images out and not rows, by `split_column = "image"`, or a model is tested on what it has learned from.

Columns: user, digit (the target), image (which of the 1,797), and p00 to p77, the pixels by row and column, from 0
to 16. A user's rows depend on the seed and the user's number alone, not on how many users there are.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

Array = npt.NDArray[Any]

USERS_AT_A_TIME = 1000
EXAMPLES = (5, 50)
LARGEST_ANGLE = 60
ANGLE_STEP = 3
PREFERENCE = 0.3
LARGEST_PIXEL = 16.0
PIXELS = tuple(f"p{row}{column}" for row in range(8) for column in range(8))


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows of some users; all of length N.

    Attributes:
        user: Names.
        digit: int64, 0 to 9.
        image: int64, the place of the image in scikit-learn's set.
        pixels: `N x 64` float64, from 0 to 16, to one decimal.
    """

    user: Array
    digit: Array
    image: Array
    pixels: Array

    def columns(self) -> dict[str, Array]:
        """Each column of the table by its name."""
        return {"user": self.user, "digit": self.digit, "image": self.image} | dict(
            zip(PIXELS, self.pixels.T, strict=True)
        )


@lru_cache(maxsize=1)
def originals() -> tuple[Array, Array]:
    """`1797 x 8 x 8` pixels from 0 to 16, and the digit of each image."""
    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


@lru_cache(maxsize=2 * LARGEST_ANGLE // ANGLE_STEP + 1)
def turned(angle: int) -> Array:
    """`1797 x 64` float64: every image turned by `angle` degrees about its middle, to one decimal."""
    images, _ = originals()
    found = rotate(images, angle, axes=(1, 2), reshape=False, order=1)
    return np.round(np.clip(found, 0.0, LARGEST_PIXEL), 1).reshape(len(images), -1)


@lru_cache(maxsize=1)
def images_of_digits() -> tuple[Array, ...]:
    """Which images show 0, which show 1, and so on."""
    _, digit = originals()
    return tuple(np.flatnonzero(digit == label) for label in range(10))


def draw_user(seed: int, number: int) -> tuple[int, Array]:
    """One user's angle in degrees, and the images that the user has, in order.

    The angle is uniform in [-60, 60], to 3 degrees; digits come by a preference ~ Dirichlet(0.3); the number of
    images is log-uniform in 5..50.
    """
    generator = np.random.default_rng([seed, number])
    angle = ANGLE_STEP * round(generator.uniform(-LARGEST_ANGLE, LARGEST_ANGLE) / ANGLE_STEP)
    preference = generator.dirichlet(np.full(10, PREFERENCE))
    fewest, most = EXAMPLES
    count = int(np.exp(generator.uniform(np.log(fewest), np.log(most + 1))))
    choices = images_of_digits()
    digits = generator.choice(10, size=min(count, most), p=preference)
    return angle, np.array([choices[digit][generator.integers(choices[digit].size)] for digit in digits])


def draw_rows(seed: int, numbers: range) -> Rows:
    """The rows of the users with these numbers."""
    drawn = [draw_user(seed, number) for number in numbers]
    image = np.concatenate([images for _, images in drawn])
    names = [f"u{number:07d}" for number in numbers]
    return Rows(
        user=np.repeat(names, [images.size for _, images in drawn]),
        digit=originals()[1][image],
        image=image,
        pixels=np.concatenate([turned(angle)[images] for angle, images in drawn]),
    )


def draw(users: int, seed: int) -> Iterator[Rows]:
    """The rows of all users, a thousand users at a time."""
    for first in range(0, users, USERS_AT_A_TIME):
        yield draw_rows(seed, range(first, min(first + USERS_AT_A_TIME, users)))


def write_csv(path: Path, parts: Iterator[Rows]) -> None:
    """A line of names, then one line an example."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(Rows)[:3]), *PIXELS])
        for rows in parts:
            writer.writerows(zip(*(column.tolist() for column in rows.columns().values()), strict=True))


def write_parquet(path: Path, parts: Iterator[Rows]) -> None:
    """A row group for each of the parts, so that no more than one of them is held in memory."""
    import pyarrow as pa  # noqa: PLC0415  CSV needs none of it
    from pyarrow.parquet import ParquetWriter  # noqa: PLC0415

    with ExitStack() as stack:
        writer: ParquetWriter | None = None
        for rows in parts:
            table = pa.table(rows.columns())
            writer = writer or stack.enter_context(ParquetWriter(path, table.schema))
            writer.write_table(table)


WRITERS = {".parquet": write_parquet, ".csv": write_csv}


def main(arguments: list[str] | None = None) -> int:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--users", type=int, default=5000, help="how many users (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, help="which users (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("digits.parquet"), help="a .parquet or .csv file")
    given = parser.parse_args(arguments)
    if given.users < 1 or given.seed < 0:
        parser.error(f"Expected --users >= 1 and --seed >= 0, got {given.users} and {given.seed}.")
    if given.out.suffix not in WRITERS:
        parser.error(f"Expected --out to end in {' or '.join(WRITERS)}, got {given.out}.")
    WRITERS[given.out.suffix](given.out, draw(given.users, given.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
