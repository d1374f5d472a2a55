"""The worked examples for networks: simulated users with digits, and what their configurations and models say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from common.config import load_config
from common.data import split
from common.loading import load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REAL_DATA = EXAMPLES.parents[1] / "shared" / "data"


def module_of(path: Path) -> ModuleType:
    """A Python file as a module, found by its path: another package may be called `examples` too."""
    spec = importlib.util.spec_from_file_location(f"neural_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = module_of(EXAMPLES / "digits" / "make_data.py")


def columns_of(users: int, seed: int = 0) -> dict[str, list]:
    parts = [rows.columns() for rows in digits.draw(users, seed)]
    return {name: np.concatenate([part[name] for part in parts]).tolist() for name in parts[0]}


def test_neural_digits_have_the_declared_columns():
    """User, digit, image and 64 pixels from 0 to 16 with one decimal; each row is its image's digit."""
    columns = columns_of(30)
    assert list(columns) == ["user", "digit", "image", *(f"p{r}{c}" for r in range(8) for c in range(8))]
    pixels = np.array([columns[name] for name in digits.PIXELS])
    assert pixels.min() >= 0
    assert pixels.max() <= 16
    assert np.array_equal(pixels, np.round(pixels, 1))
    _, digit = digits.originals()
    assert columns["digit"] == digit[columns["image"]].tolist()
    _, counts = np.unique(columns["user"], return_counts=True)
    assert counts.size == 30
    assert counts.min() >= 5
    assert counts.max() <= 50


def test_neural_digits_are_the_seeds():
    """The same seed is the same table, another seed another; a user stays when there are more users."""
    few = columns_of(20, seed=3)
    assert columns_of(20, seed=3) == few
    assert columns_of(20, seed=4) != few
    many = columns_of(25, seed=3)
    assert {name: column[: len(few["user"])] for name, column in many.items()} == few


def test_neural_digits_of_many_users_come_in_parts(monkeypatch):
    """How many users are made at a time changes nothing."""
    whole = columns_of(7)
    monkeypatch.setattr(digits, "USERS_AT_A_TIME", 3)
    assert [np.unique(part.user).size for part in digits.draw(7, 0)] == [3, 3, 1]
    assert columns_of(7) == whole


def test_neural_digits_are_drawn_with_replacement_and_by_preference():
    """Users share images and see some twice, and a user's commonest digit is far more than a tenth of the user's."""
    drawn = [digits.draw_user(0, number) for number in range(400)]
    images = [images.tolist() for _, images in drawn]
    assert any(len(set(own)) < len(own) for own in images)
    assert sum(map(len, images)) > 2 * len(set().union(*images))
    _, digit = digits.originals()
    commonest = [np.bincount(digit[own]).max() / len(own) for own in images if len(own) >= 20]
    assert np.median(commonest) > 0.3


def test_neural_digits_number_of_examples_is_log_uniform():
    """Each third of the logarithm from 5 to 51 has a third of 2,000 users, within 5 sd (by chance with 2e-6)."""
    counts = [digits.draw_user(1, number)[1].size for number in range(2000)]
    ends = np.exp(np.linspace(np.log(5), np.log(51), 4))
    # a count is the floor of a log-uniform number, so a bound inside falls into the count below it
    expected = np.diff([np.log(np.ceil(end) / 5) for end in ends]) / np.log(51 / 5)
    found = np.histogram(counts, bins=np.ceil(ends))[0] / 2000
    assert np.abs(found - expected).max() < 5 * (0.25 / 2000) ** 0.5


def test_neural_digits_styles_turn_the_images():
    """A user's pixels are the images turned by that user's angle, one of many from -60 to 60 degrees."""
    rows = digits.draw_rows(0, range(8))
    angles = []
    for number, name in enumerate(np.unique(rows.user)):
        angle, images = digits.draw_user(0, number)
        angles.append(angle)
        own = rows.user == name
        assert rows.image[own].tolist() == images.tolist()
        assert np.array_equal(rows.pixels[own], digits.turned(angle)[images])
    assert len(set(angles)) > 4
    drawn = {digits.draw_user(0, number)[0] for number in range(1000)}
    assert drawn == set(range(-60, 61, 3))


def direction(pixels: np.ndarray) -> float:
    """The direction in degrees, from -90 to 90, counter-clockwise from upright, in which an image's ink lies."""
    ink = pixels.reshape(8, 8)
    row, column = np.mgrid[3.5:-4.5:-1, -3.5:4.5]
    row, column = row - (ink * row).sum() / ink.sum(), column - (ink * column).sum() / ink.sum()
    twist = 2 * (ink * row * column).sum()
    return float(np.degrees(np.arctan2(-twist, (ink * (row**2 - column**2)).sum())) / 2)


@pytest.mark.parametrize("angle", [-45, -30, 30, 45])
def test_neural_digits_turn_about_the_middle_by_the_angle(angle):
    """Ones stand upright; turned by an angle their ink lies in that direction, and no angle leaves all as it was."""
    images, digit = digits.originals()
    assert np.array_equal(digits.turned(0), images.reshape(-1, 64))
    ones = np.flatnonzero(digit == 1)
    turns = [direction(digits.turned(angle)[one]) - direction(digits.turned(0)[one]) for one in ones]
    assert abs(abs(np.median(turns)) - abs(angle)) < 5
    assert np.sign(np.median(turns)) == np.sign(angle)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_neural_digits_load_by_their_configuration(tmp_path, monkeypatch, suffix):
    """The command's file is what `config.toml` declares: no bad row, nothing clipped, images held out for everybody."""
    monkeypatch.chdir(tmp_path)
    assert digits.main(["--users", "40", "--seed", "1", "--out", f"digits.{suffix}"]) == 0
    config = load_config(EXAMPLES / "digits" / "config.toml", {"data.source": f"digits.{suffix}"})
    loaded = load(config.data, config.model.family)
    population, columns = loaded.population, columns_of(40, seed=1)
    assert (loaded.num_bad_rows, loaded.num_clipped) == (0, 0)
    assert (population.num_users, population.dimension) == (40, 65)
    assert population.y.tolist() == columns["digit"]
    pixels = np.array([columns[name] for name in digits.PIXELS]).T
    np.testing.assert_allclose(population.features.rows(slice(None))[:, :64], pixels / 8 - 1, rtol=0, atol=1e-12)
    train, test = split(population, 0)
    assert set(train.key.tolist()).isdisjoint(test.key.tolist())
    assert len(set(population.key.tolist())) == len(set(columns["image"]))
    assert 0.1 < test.num_examples / population.num_examples < 0.3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--users", "0"], "Expected --users >= 1"),
        (["--seed", "-1"], "--seed >= 0"),
        (["--out", "digits.txt"], "Expected --out to end in .parquet or .csv, got digits.txt."),
    ],
)
def test_neural_digits_command_names_what_is_wrong(arguments, problem, capsys):
    """Exit code 2 and what was expected, before anything is drawn."""
    with pytest.raises(SystemExit) as ended:
        digits.main(arguments)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def test_neural_digits_model_takes_pixels_to_digits():
    """64 numbers in, one for each of the ten digits out, as the declared range has them."""
    config = load_config(EXAMPLES / "digits" / "config.toml")
    model = module_of(EXAMPLES / "digits" / "model.py").make_model()
    assert config.data.target_range is not None
    assert model(torch.zeros(3, len(config.data.features))).shape == (3, config.data.target_range[1] + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4810


def test_neural_recommender_model_takes_a_movie_to_a_rating():
    """As many numbers in as MovieLens has features without the intercept, one rating out."""
    config = load_config(EXAMPLES / "recommender" / "config.toml")
    module = module_of(EXAMPLES / "recommender" / "model.py")
    model = module.make_model()
    assert config.model.family == "squared"
    assert model(torch.zeros(5, module.FEATURES)).shape == (5, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3841


@pytest.mark.parametrize("name", ["ml-1m-part", "ml-100k"])
def test_neural_recommender_fits_the_real_data_sets(name):
    """Both MovieLens sets have that many features."""
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not at hand")
    config = load_config(EXAMPLES / "recommender" / "config.toml", {"data.source": str(folder)})
    names = load(config.data, config.model.family).schema.feature_names
    assert len(names) - 1 == module_of(EXAMPLES / "recommender" / "model.py").FEATURES
    assert names[-1] == "intercept"
