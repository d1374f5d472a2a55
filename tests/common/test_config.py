"""The configuration: defaults, TOML and back, and errors that name the key and the remedy."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config import Config, DataConfig, FeatureConfig, SyntheticConfig, load_config, valid_keys
from common.errors import UmbelError


def error_of(tmp_path: Path, text: str) -> str:
    """The message for a file with that text, which must be one line that begins with the file."""
    path = tmp_path / "umbel.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UmbelError) as caught:
        load_config(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}: Expected ")
    return message.removeprefix(f"{path}: ")


def test_nothing_given_is_the_default() -> None:
    """No file and no option is the default configuration, which is a private one."""
    config = load_config(None)
    assert config == Config()
    assert config.data.source == "synthetic"
    assert config.privacy.epsilon != "none"
    assert config.privacy.seed is None


def test_options_win_over_the_file(tmp_path: Path) -> None:
    """An option replaces the file's key; None means that it was not given."""
    path = tmp_path / "umbel.toml"
    path.write_text('[model]\nrank = 3\nsparsity = 2\n[privacy]\nepsilon = "none"\n')
    config = load_config(path, {"model.rank": 4, "model.sparsity": None, "data.synthetic.users": 7})
    assert (config.model.rank, config.model.sparsity) == (4, 2)
    assert config.data.synthetic.users == 7
    assert config.privacy.epsilon == "none"


@pytest.mark.parametrize(("given", "epsilon"), [("2", 2.0), (2, 2.0), ("none", "none"), ("1e-1", 0.1)])
def test_epsilon_may_be_text_for_command_lines(given: object, epsilon: object) -> None:
    """`--epsilon 2` and `--epsilon none` are both text."""
    assert load_config(None, {"privacy.epsilon": given}).privacy.epsilon == epsilon


def test_features_are_names_ranges_or_vocabularies(tmp_path: Path) -> None:
    """A feature may be a bare name, a name with a range, or a name with a vocabulary of texts or numbers."""
    path = tmp_path / "umbel.toml"
    path.write_text(
        '[data]\nsource = "t.csv"\ntarget_range = [1, 5]\n'
        'features = ["a", { name = "b", low = 0, high = 9.5 }, { name = "c", values = ["x", 2] }]\n'
    )
    config = load_config(path)
    assert config.data.features == (
        FeatureConfig(name="a"),
        FeatureConfig(name="b", low=0.0, high=9.5),
        FeatureConfig(name="c", values=("x", "2")),
    )
    assert config.data.target_range == (1.0, 5.0)


def test_everything_survives_toml(tmp_path: Path) -> None:
    """What `to_toml` writes reads back as an equal configuration, with every kind of value set."""
    data = DataConfig(
        source='a "quoted" \\ path\twith é, \n and \x7f.csv',
        features=(FeatureConfig(name="a", low=-0.5, high=1e-9), FeatureConfig(name="b", values=("é", '"'))),
        target_range=(1.0, 5.0),
        synthetic=SyntheticConfig(examples=(2, 60)),
    )
    config = load_config(None, {"privacy.delta": 1e-7, "privacy.epsilon": "none", "privacy.clipping": 2.5})
    config = config.model_copy(update={"data": data})
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8", newline="\n")
    assert load_config(path) == config


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20), st.floats(1e-300, 1e300))
def test_any_text_and_number_survives_toml(text: str, number: float) -> None:
    """Texts and floats are written so that TOML reads the very same back."""
    config = load_config(None, {"run.out": text, "privacy.epsilon": number})
    read = tomllib.loads(config.to_toml())
    assert read["run"]["out"] == text
    assert read["privacy"]["epsilon"] == number


def test_a_configuration_cannot_be_changed() -> None:
    """Sections are frozen, so what was resolved is what was run."""
    config = Config()
    with pytest.raises((ValidationError, dataclasses.FrozenInstanceError)):
        config.model.rank = 3


def test_the_keys_are_the_sections_of_the_design() -> None:
    """Seven sections; only the privacy section holds what can change privacy."""
    sections = {"data", "model", "network", "training", "amht", "privacy", "run"}
    assert {key.split(".")[0] for key in valid_keys()} == sections
    assert "data.synthetic.users" in valid_keys()
    private = {"epsilon", "delta", "ledger_epsilon", "max_nodes_per_user", "clipping", "seed", "max_users_per_node"}
    private |= {"sampling_probability", "noise"}
    assert {key.split(".")[1] for key in valid_keys() if key.startswith("privacy.")} == private


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("[privacy]\nepsilom = 1", "privacy.epsilom=1", "Did you mean privacy.epsilon?"),
        ("[training]\nrank = 3", "training.rank=3", "Did you mean model.rank?"),
        ("epsilon = 3", "epsilon=3", "Did you mean privacy.epsilon?"),
        ("[modle]\nrank = 3", "modle=", "Did you mean model?"),
        ("[model]\nzzz = 1", "model.zzz=1", "Known here: family, rank, sparsity."),
        ("zzz = 1", "zzz=1", "Known here: data, model, network, training, amht, privacy, run."),
        (
            "[data]\nsource = 't.csv'\nfeatures = [{ name = 'a', lwo = 1 }]",
            "data.features.0.lwo",
            "features.0.low?",
        ),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(tmp_path: Path, text: str, key: str, remedy: str) -> None:
    """A misspelt key is named with the key that was probably meant, in its section first."""
    message = error_of(tmp_path, text)
    assert message.startswith(f"Expected a known key, got {key}")
    assert message.endswith(remedy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[privacy]\nepsilon = 0", "above 0 and below infinity, or 'none', got privacy.epsilon=0."),
        ("[privacy]\nepsilon = -1.5", "got privacy.epsilon=-1.5."),
        ("[privacy]\nepsilon = nan", "got privacy.epsilon=nan."),
        ("[privacy]\nepsilon = inf", "got privacy.epsilon=inf."),
        ("[privacy]\nepsilon = true", "got privacy.epsilon=True."),
        ('[privacy]\nepsilon = "non"', "got privacy.epsilon='non'."),
        ("[privacy]\ndelta = 0.0", "greater than 0, got privacy.delta=0.0."),
        ("[privacy]\ndelta = 1.0", "less than 1, got privacy.delta=1.0."),
        ("[privacy]\ndelta = nan", "got privacy.delta=nan."),
        ('[privacy]\nclipping = "adaptiv"', "or 'adaptive', got privacy.clipping='adaptiv'."),
        ("[privacy]\nmax_nodes_per_user = 0", "got privacy.max_nodes_per_user=0."),
        ("[model]\nrank = 2.5", "a whole number, got model.rank=2.5. Leave it out for the default 8."),
        ("[model]\nrank = true", "a whole number, got model.rank=True."),
        ('[model]\nfamily = "logit"', "one of 'squared', 'logistic' or 'softmax', got model.family='logit'."),
        ("[training]\nround_timeout = inf", "got training.round_timeout=inf."),
        ("[run]\nresume = 1", "true or false, got run.resume=1."),
        ("[data]\nsource = 3", "a text in quotes, got data.source=3."),
        ("[data]\ntest_fraction = 1", "less than 1, got data.test_fraction=1."),
        ("[data]\ntarget_range = [5, 1]", "low < high, got data.target_range=[5, 1]."),
        ("[data]\ntarget_range = [1, inf]", "got data.target_range=[1, inf]."),
        ('[data]\nfeatures = "age"', "a list, got data.features='age'."),
        ("[data]\nfeatures = [3]", "got data.features.0=3."),
        ("[data]\nfeatures = [{ low = 0, high = 1 }]", "Expected data.features.0.name, got none."),
        ('[data]\nfeatures = [{ name = "a", low = 1 }]', "both low and high"),
        ('[data]\nfeatures = [{ name = "a", low = 1, high = nan }]', "finite and low < high"),
        ('[data]\nfeatures = [{ name = "a", low = 0, high = 1, values = ["x"] }]', "not both"),
        ('[data]\nfeatures = [{ name = "a", values = ["x", "x"] }]', "a list of different values"),
        ('[data]\nformat = "table"', "data.source to be a file or folder for data.format='table'"),
        ('[data]\nformat = "csv"', "one of 'auto', 'movielens-1m'"),
        ("[data.synthetic]\nexamples = 0", "got data.synthetic.examples=0. Leave it out for the default [4, 60]."),
        ("[data.synthetic]\nexamples = [5, 2]", "got data.synthetic.examples=[5, 2]."),
        ("[data.synthetic]\ndimension = 2", "rank and sparsity of at most dimension"),
        ("data = 3", "a table, got data=3. Write [data] and its keys below."),
        ("[privacy", "TOML in UTF-8"),
        ("[privacy]\nepsilon = none", "TOML in UTF-8"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path: Path, text: str, expected: str) -> None:
    """One line says the file, the key, its value, what was expected and what to do."""
    assert expected in error_of(tmp_path, text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"privacy.epsilon": -1.0}, "got privacy.epsilon=-1.0."),
        ({"privacy.epsilom": 1.0}, "Did you mean privacy.epsilon?"),
        (
            {"data.synthetic": 3, "data.synthetic.users": 1},
            "Expected a known key, got data.synthetic.users=1.",
        ),
    ],
)
def test_a_wrong_option_is_named_as_such(tmp_path: Path, options: dict[str, object], expected: str) -> None:
    """What came from the command line is not blamed on the file."""
    path = tmp_path / "umbel.toml"
    path.write_text("[model]\nrank = 3\n")
    with pytest.raises(UmbelError) as caught:
        load_config(path, options)
    assert str(caught.value).startswith("command line: Expected ")
    assert expected in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A configuration file that is not there is an error of one line."""
    with pytest.raises(UmbelError, match=r"nowhere.toml: Expected a configuration file, got No such file"):
        load_config(tmp_path / "nowhere.toml")


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    """A file that is not UTF-8 is bad input, not a crash."""
    path = tmp_path / "umbel.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UmbelError, match="Expected TOML in UTF-8"):
        load_config(path)


@pytest.mark.parametrize(
    ("given", "read"), [("0.1", "0.1"), (".1", "0.1"), (0.1, "0.1"), (1e-05, "0.00001"), (None, None)]
)
def test_a_sampling_probability_is_the_ledgers_decimal_string(given, read):
    """However it was written, and the same after it was read back."""
    config = load_config(None, {"privacy.sampling_probability": given})
    assert config.privacy.sampling_probability == read
    assert Config.model_validate(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("given", ["0", "1", "1.5", "-0.1", "nan", "inf", 1, 0, 1.0, "1e-3", True, "0.", "0.0"])
def test_what_is_no_sampling_probability_is_refused(given):
    """Zero, one and more, and what is no decimal."""
    with pytest.raises(UmbelError, match="above 0 and below 1"):
        load_config(None, {"privacy.sampling_probability": given})
