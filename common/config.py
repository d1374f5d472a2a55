"""The configuration: seven sections, read once from TOML at the edge of the program and never changed.

Below that edge functions take the numbers they use, not the configuration. What can change privacy is in
`PrivacyConfig` and nowhere else.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from common.errors import UmbelError
from common.task import Fitting, Moment

Family: TypeAlias = Literal["squared", "logistic", "softmax"]
Algorithm: TypeAlias = Literal["gradient", "amht-lrs"]
DataFormat: TypeAlias = Literal["auto", "movielens-1m", "movielens-100k", "ratings", "table", "synthetic"]

_OPTIONS_SOURCE = "command line"
_SHOWN_CHARACTERS = 60
_DECIMALS = re.compile(r"0\.[0-9]{1,18}", re.ASCII)
_EXPECTATIONS = {
    "bool_type": "true or false",
    "string_type": "a text in quotes",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "tuple_type": "a list",
}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _parsed(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _number_or_word(word: str) -> BeforeValidator:
    """A positive finite number (as text too, for command lines), or the one word that stands for none."""

    def check(value: Any) -> float | str:
        if value == word:
            return word
        number = _parsed(value)
        if not (_is_number(number) and number > 0):
            raise ValueError(f"a number above 0 and below infinity, or {word!r}")
        return float(number)

    return BeforeValidator(check)


def _range(value: Any) -> tuple[float, float]:
    pair = value if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)) or not pair[0] < pair[1]:
        raise ValueError("two finite numbers [low, high] with low < high")
    return float(pair[0]), float(pair[1])


def _one_or_range(value: Any) -> int | tuple[int, int]:
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    whole = len(pair) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in pair)
    if not whole or not 1 <= pair[0] <= pair[1]:
        raise ValueError("a whole number of at least 1, or [low, high] of two of them")
    return pair if isinstance(value, list | tuple) else int(value)


def _probability(value: Any) -> Any:
    """A decimal string below 1, as the ledger spells it: ".1" and 0.1 are "0.1"."""
    text = format(Decimal(repr(value)), "f") if type(value) is float and math.isfinite(value) else value
    text = f"0{text}" if isinstance(text, str) and text.startswith(".") else text
    if text is not None and not (isinstance(text, str) and _DECIMALS.fullmatch(text) and float(text) > 0):
        raise ValueError("a decimal number above 0 and below 1, such as 0.1")
    return text


def _texts(value: Any) -> tuple[str, ...]:
    texts = tuple(str(v) for v in value) if isinstance(value, list | tuple) else ()
    if not texts or len(set(texts)) < len(texts):
        raise ValueError("a list of different values")
    return texts


Range: TypeAlias = Annotated[tuple[float, float], BeforeValidator(_range)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Seed: TypeAlias = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FeatureConfig(_Section):
    """One column of features: numeric in a declared range, or a vocabulary to be one-hot.

    Attributes:
        name: The column.
        low: Lowest value, mapped to -1. Without a range a column is taken to be in [-1, 1] already, and a
            column of a public item table is divided by the largest magnitude in that table.
        high: Highest value, mapped to 1.
        values: The vocabulary, as text; makes the column categorical.
    """

    name: str
    low: float | None = None
    high: float | None = None
    values: Annotated[tuple[str, ...], BeforeValidator(_texts)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "FeatureConfig":
        declared = self.low is not None or self.high is not None
        if declared and self.values is not None:
            raise ValueError("numeric with low and high, or a vocabulary with values, not both")
        if declared:
            try:
                _range((self.low, self.high))
            except ValueError as error:
                raise ValueError("a column with both low and high, finite and low < high") from error
        return self


def _feature(value: Any) -> Any:
    if not isinstance(value, str | Mapping | FeatureConfig):
        raise ValueError("a column's name, or { name = ..., low = ..., high = ... }, or { name = ..., values = [...] }")
    return {"name": value} if isinstance(value, str) else value


class SyntheticConfig(_Section):
    """A population drawn from a known model; the seed fixes harmless randomness only.

    Attributes:
        users: How many.
        examples: Of each user; `[low, high]` draws a number in between for each.
        dimension: Number of features.
        rank: Columns of the true U.
        sparsity: Nonzeros of each user's true b.
        noise: Standard deviation of an example's noise (squared loss only).
        seed: Of the generator.
        beta_scale: Length of the true beta.
        U_scale: Singular values of the true U.
        b_scale: Standard deviation of a nonzero of b.
        precision: In which the features are stored.
    """

    users: Count = 2000
    examples: Annotated[int | tuple[int, int], BeforeValidator(_one_or_range)] = (4, 60)
    dimension: Count = 30
    rank: Annotated[int, Field(ge=0)] = 3
    sparsity: Annotated[int, Field(ge=0)] = 3
    noise: NotNegative = 0.3
    seed: Seed = 0
    beta_scale: NotNegative = 1.0
    U_scale: NotNegative = 1.0
    b_scale: NotNegative = 1.0
    precision: Literal["float64", "float32"] = "float64"

    @model_validator(mode="after")
    def _fits(self) -> "SyntheticConfig":
        if max(self.rank, self.sparsity) > self.dimension:
            raise ValueError("rank and sparsity of at most dimension")
        return self


class DataConfig(_Section):
    """Where the data are and what is publicly declared about them.

    Attributes:
        source: A file or folder, or "synthetic".
        format: How to read it; "auto" goes by the files that are there.
        user: Column with the user; by default `user`, `user_id` or `userId`.
        item: Column with the item; by default `item`, `item_id`, `itemId` or `movieId`.
        target: Column with the target; by default `target`, `y`, `label` or `rating`.
        weight: Column with a weight of at least 0, if any.
        timestamp: Column with seconds or ISO 8601 times, if any; a user's examples are put in that order.
        event_id: Column that names an event of a user, if any; a second row with the same one is a bad row.
        features: Columns of a table (or of the item table), with their declared ranges or vocabularies.
        table: Which table of a SQLite file.
        item_features: CSV of public item features: the item column and numeric columns.
        catalogue: Public list of item ids, one a line; items become one-hot.
        target_range: Lowest and highest target, declared and not computed from users' data.
        target_offset: Taken off the target; by default the middle of the range, and nothing for classes.
        test_fraction: Share of examples held out, by rule.
        split_column: Column of a table; rows with the same value there, of whatever users, are held out together.
        split_seed: Which split; harmless.
        on_bad_rows: Stop a simulation at a bad row, or drop and count it; a node always does the latter.
        max_examples: Public limit on a user's examples; a fixed random sample is kept of more.
        synthetic: The population of `source = "synthetic"`.
    """

    source: str = "synthetic"
    format: DataFormat = "auto"
    user: str | None = None
    item: str | None = None
    target: str | None = None
    weight: str | None = None
    timestamp: str | None = None
    event_id: str | None = None
    features: Annotated[tuple[Annotated[FeatureConfig, BeforeValidator(_feature)], ...], Field(strict=False)] = ()
    table: str | None = None
    item_features: str | None = None
    catalogue: str | None = None
    target_range: Range | None = None
    target_offset: Annotated[float, Field(allow_inf_nan=False)] | None = None
    test_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.2
    split_column: str | None = None
    split_seed: Seed = 0
    on_bad_rows: Literal["error", "skip"] = "error"
    max_examples: Count = 2000
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _source_fits_format(self) -> "DataConfig":
        if self.format != "auto" and (self.format == "synthetic") != (self.source == "synthetic"):
            wanted = "'synthetic'" if self.format == "synthetic" else "a file or folder"
            raise ValueError(f"data.source to be {wanted} for data.format={self.format!r}")
        return self


class ModelConfig(_Section):
    """The model theta_i = beta + U w_i + b_i.

    Attributes:
        family: The loss.
        rank: Columns of U.
        sparsity: Cap on the nonzeros of b_i.
    """

    family: Family = "squared"
    rank: Count = 8
    sparsity: Annotated[int, Field(ge=0)] = 5


class NetworkConfig(_Section):
    """A network instead of a linear model, whose layers become base + U W_i + B_i.

    `model.rank` and `model.sparsity` are then those of every adapted layer.

    Attributes:
        module: "FILE.py:FUNCTION", which returns the torch module; without it the model is linear.
        weights: safetensors file with the module's weights to start from, which everybody may have; by default those
            that the module comes with.
        layers: Names of the adapted linear, convolution and embedding layers, or patterns such as "encoder.*".
        form: How a layer is read as a matrix of d rows: "vector" (d its entries, one column) or "matrix" (the longer
            side).
        train_base: Whether the base is learned too; otherwise it stays as it was.
        steps: Gauss-Newton steps with which a user is fitted.
        local_steps: 1 has users send a gradient; more have them send how far so many steps moved the shared part.
        local_step_size: Of each of them.
        step_size: How far the server's first step goes: in weights if users send gradients, else in clipping norms.
        U_scale: By how much a typical user moves a layer at the start.
        b_variance: Prior variance of a nonzero of B at the start.
    """

    module: str | None = None
    weights: str | None = None
    layers: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ("*",)
    form: Literal["vector", "matrix"] = "vector"
    train_base: bool = True
    steps: Annotated[int, Field(ge=1, le=100)] = 2
    local_steps: Annotated[int, Field(ge=1, le=100)] = 1
    local_step_size: Positive = 0.1
    step_size: Positive = 5.0
    U_scale: Positive = 0.3
    b_variance: Positive = 0.3


class TrainingConfig(_Section):
    """How rounds are run.

    Attributes:
        rounds: How many releases.
        algorithm: How the server learns: "gradient" ascent on the users' marginal likelihood, or "amht-lrs",
            alternating minimization as published.
        start: The run folder or released model that training starts from; by default it starts from public facts alone.
        start_is_public: The operator says that everybody may have that model, which then may be of any ledger.
        engine: "in-process" (this process) or "flower" (the Flower Simulation Engine).
        device: Where networks are computed, as torch calls it: "cpu", "cuda", "cuda:1".
        nodes: Into how many nodes a simulation splits the users.
        round_timeout: Seconds to wait for replies; a round goes on with whoever answered.
        startup_timeout: Seconds to wait for all nodes of the registry; a run begins with those that are connected.
    """

    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    algorithm: Algorithm = "gradient"
    start: str | None = None
    start_is_public: bool = False
    engine: Literal["in-process", "flower"] = "in-process"
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] = "cpu"
    nodes: Count = 2
    round_timeout: Positive = 600.0
    startup_timeout: Positive = 120.0


class AmhtConfig(Fitting):
    """AMHT-LRS (arXiv:2210.03505), where `training.algorithm` asks for it.

    Attributes:
        initialization: Where U starts: from a released moment of the data, which is the first of the run's
            releases, or "random", which costs none.
        sample_splitting: Every round uses another part of each user's examples, as the analysis assumes.
    """

    initialization: Moment | Literal["random"] = "pair-moments"
    sample_splitting: bool = False

    @property
    def fitting(self) -> Fitting:
        """How a user is fitted."""
        return Fitting(**{name: getattr(self, name) for name in Fitting.model_fields})


class PrivacyConfig(_Section):
    """Everything that can change the privacy guarantee.

    Attributes:
        epsilon: What the run may spend, or "none" for a run without noise.
        ledger_epsilon: Budget of a ledger that the run has to make, for this run and later ones; by default `epsilon`.
        delta: Of the budget; by default min(1e-6, 1 / (10 n)) for n users.
        max_nodes_per_user: Up to how many nodes one person may be a user of; multiplies the sensitivity.
        clipping: "adaptive", or a public constant clipping norm.
        noise: Gaussians rounded to integers, "rounded", or OpenDP's discrete Gaussians, "discrete".
        seed: Fixes the privacy randomness: the run is then NOT PRIVATE.
        max_users_per_node: A node with more is not invited.
        sampling_probability: With which each user contributes to a release, by a coin of that user's own device; a
            decimal string below 1. Without it every user contributes to every release.
    """

    epsilon: Annotated[float | Literal["none"], _number_or_word("none")] = 1.0
    ledger_epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    max_nodes_per_user: Count = 1
    clipping: Annotated[float | Literal["adaptive"], _number_or_word("adaptive")] = "adaptive"
    noise: Literal["rounded", "discrete"] = "rounded"
    seed: Seed | None = None
    max_users_per_node: Count = 1_000_000
    sampling_probability: Annotated[str | None, BeforeValidator(_probability)] = None

    @model_validator(mode="after")
    def _sampling_has_noise(self) -> "PrivacyConfig":
        if self.sampling_probability is not None and self.epsilon == "none":
            raise ValueError("privacy.epsilon to be a number for a sampled run, whose noise sampling amplifies")
        return self

    @model_validator(mode="after")
    def _seed_reaches_the_noise(self) -> "PrivacyConfig":
        if self.seed is not None and self.noise == "discrete":
            raise ValueError("privacy.noise='rounded' with privacy.seed, for OpenDP's noise cannot be seeded")
        return self


class RunConfig(_Section):
    """Where a run leaves its files.

    Attributes:
        out: The run folder; by default the command picks one.
        ledger: The population's ledger to charge; by default one in the run folder.
        stores: Whether the simulated nodes keep their filters and personal models in files, or nothing at all.
        resume: Go on with the run that is in `out`.
        name: Of the run in its ledger; the command makes one.
        noise_multiplier: z of each release, from the plan; the command fills it in.
        capped_mu_max: What runs without sampling may cost on the ledger of a sampled run, from the plan likewise.
    """

    out: str | None = None
    ledger: str | None = None
    stores: Literal["files", "memory"] = "files"
    resume: bool = False
    name: str | None = None
    noise_multiplier: str | None = None
    capped_mu_max: str | None = None


class Config(_Section):
    """The whole configuration, resolved."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()
    amht: AmhtConfig = AmhtConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _family_fits_model(self) -> "Config":
        if self.network.module is None and self.model.family == "softmax":
            raise ValueError("a network with model.family='softmax', got none; set network.module, or another family")
        if self.network.module is not None and self.training.algorithm != "gradient":
            raise ValueError("training.algorithm='gradient' with network.module, got another; leave one of them out")
        if self.network.module is not None and self.training.start is not None:
            raise ValueError("no training.start with network.module, got both; set network.weights instead")
        return self

    def to_toml(self) -> str:
        """The configuration as TOML that `load_config` reads back to an equal one, without unset keys."""
        return to_toml(self.model_dump(exclude_none=True))


def to_toml(tables: Mapping[str, Any]) -> str:
    """Nested plain values as TOML, keys before tables."""
    return "\n\n".join(_toml_blocks((), tables)) + "\n"


def load_config(path: Path | str | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file and put `overrides` (dotted key to value; None means not given) on top.

    Args:
        path: The file, or None for the defaults.
        overrides: For example `{"privacy.epsilon": 2.0}`.

    Returns:
        The validated configuration.

    Raises:
        UmbelError: In one line, naming the file, the key, its value, what was expected and a remedy.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    tree = {} if path is None else _read_toml(Path(path))
    for key, value in given.items():
        _put(tree, key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    from_option = path is None or any(key == k or key.startswith(f"{k}.") for k in given)
    where = _OPTIONS_SOURCE if from_option else str(path)
    message = f"{where}: {_explain(key, problem['type'], problem['msg'], problem['input'])}"
    raise UmbelError(" ".join(message.split()))


def valid_keys() -> tuple[str, ...]:
    """Every dotted key of the configuration."""
    return tuple(_keys(Config, ""))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UmbelError(f"{path}: Expected a configuration file, got {error.strerror}.") from error
    except ValueError as error:  # tomllib.TOMLDecodeError and UnicodeDecodeError are both of this kind
        problem = str(error).splitlines()[0]
        raise UmbelError(f"{path}: Expected TOML in UTF-8, got this problem: {problem}.") from error


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for depth, section in enumerate(sections):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            parent = ".".join(sections[: depth + 1])
            raise UmbelError(f"{_OPTIONS_SOURCE}: {_explain(key, 'extra_forbidden', parent, value)}")
    tree[leaf] = value


def _explain(key: str, kind: str, message: str, value: Any) -> str:
    shown = repr(value)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"{shown[:_SHOWN_CHARACTERS]}..."
    if kind == "extra_forbidden":
        return f"Expected a known key, got {key}={shown}. {_nearest(key)}"
    if kind == "missing":
        return f"Expected {key}, got none. Add it."
    if kind in ("model_type", "model_attributes_type"):
        return f"Expected a table, got {key}={shown}. Write [{key}] and its keys below."
    expectation = _EXPECTATIONS.get(kind) or message.removeprefix("Value error, ")
    expectation = expectation.replace("Input should be", "one of" if kind == "literal_error" else "a value")
    if not key:  # of the whole, where what does not go together is named already
        return f"Expected {expectation}."
    return f"Expected {expectation}, got {key}={shown}. {_default(key)}"


def _nearest(key: str) -> str:
    section, _, leaf = key.rpartition(".")
    known = valid_keys()
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    if section.startswith("data.features."):
        siblings = [f"{section}.{name}" for name in FeatureConfig.model_fields]
    sections = {k.rpartition(".")[0] for k in known}
    elsewhere = sorted(sections.union(known), key=lambda k: k.count("."), reverse=True)
    for candidates in (siblings or list(Config.model_fields), elsewhere):
        by_leaf = {k.rpartition(".")[2]: k for k in candidates}
        if match := difflib.get_close_matches(leaf, by_leaf, n=1):
            return f"Did you mean {by_leaf[match[0]]}?"
    return f"Known here: {', '.join(k.rpartition('.')[2] for k in siblings) or ', '.join(Config.model_fields)}."


def _default(key: str) -> str:
    value: Any = Config()
    for part in key.split("."):
        value = getattr(value, part, None)
    if value is None or key not in valid_keys():
        return "Correct it or leave it out."
    return f"Leave it out for the default {_toml_value(value)}."


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _toml_blocks(path: tuple[str, ...], tables: Mapping[str, Any]) -> Iterator[str]:
    plain = [f"{k} = {_toml_value(v)}" for k, v in tables.items() if not isinstance(v, Mapping)]
    if plain:
        yield "\n".join([f"[{'.'.join(path)}]", *plain] if path else plain)
    for name, inner in tables.items():
        if isinstance(inner, Mapping):
            yield from _toml_blocks((*path, name), inner)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
