"""From the options of a command to a configuration."""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config import Config, load_config
from common.errors import UmbelError

_RESUMED_TOO = {"run.out"}


def configuration(given: Mapping[str, Any], *, pairs: Iterable[str], file: Path | None, resume: Path | None) -> Config:
    """A TOML file with options on top; or, to resume, nothing but the folder of a run.

    Args:
        given: Options by dotted key; None for those that were not given.
        pairs: `key=value` of --set.
        file: The TOML file.
        resume: The folder to resume.

    Raises:
        UmbelError: Naming the key, its value and a remedy.
    """
    overrides = {key: _plain(key, value) for key, value in given.items() if value is not None}
    for pair in pairs:
        key, value = _pair(pair)
        if key in overrides:
            raise UmbelError(f"Expected one value for {key}, got two. Leave one of them out.")
        overrides[key] = value
    if resume is None:
        return load_config(file, overrides)
    if file is not None or not overrides.keys() <= _RESUMED_TOO:
        names = sorted([*overrides.keys() - _RESUMED_TOO, *(["--config"] if file else [])])
        raise UmbelError(f"Expected --resume to go on with a run as it was started, got {names[0]} too. Leave it out.")
    if Path(overrides.get("run.out", resume)).resolve() != resume.resolve():
        raise UmbelError(f"Expected one folder to resume, got --resume {resume} and --out {overrides['run.out']}.")
    return load_config(None, {"run.out": str(resume), "run.resume": True})


def with_folder(config: Config, default_folder: Callable[[], Path]) -> Config:
    """The configuration with a run folder, chosen here so that whoever interrupts a run can be told of it."""
    if config.run.out is not None or config.run.resume:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"out": str(default_folder())})})


def _plain(key: str, value: Any) -> Any:
    if key == "data.target_range":
        return _value(f"[{value}]")
    return str(value) if isinstance(value, Path) else value


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UmbelError(f"Expected --set key=value, got --set {text!r}. Try --set data.synthetic.users=60.")
    return key.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """A TOML value; what is none is a text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text
