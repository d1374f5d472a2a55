"""From the options of a command to a configuration."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config import Config, load_config
from common.errors import UmbelError

_RESUMED_TOO = {"run.out"}
_NAMES = {"data.source": "--data", "data.format": "--data-format", "network.module": "--model"}
"""Options that are not called as the last part of their key."""
_PROBLEM = re.compile(r"(?P<where>.*?): (?P<what>Expected .*?, got (?P<key>[\w.]+)=.*)", re.DOTALL)
_LEAVE_IT_OUT = re.compile(r"(Correct it or l|L)eave it out( for the default .*)?\.$", re.DOTALL)


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
    typed = {key: _NAMES.get(key, f"--{key.rpartition('.')[2].replace('_', '-')}") for key in overrides}
    for pair in pairs:
        key, value = _pair(pair)
        if key in overrides:
            raise UmbelError(f"Expected one value for {key}, got two. Leave one of them out.")
        overrides[key], typed[key] = value, f"--set {key}"
    if resume is None:
        return _loaded(file, overrides, typed)
    if file is not None or not overrides.keys() <= _RESUMED_TOO:
        names = [f"{typed[key]} ({key})" for key in sorted(overrides.keys() - _RESUMED_TOO)] or ["--config"]
        raise UmbelError(f"Expected --resume to go on with a run as it was started, got {names[0]} too. Leave it out.")
    if Path(overrides.get("run.out", resume)).resolve() != resume.resolve():
        raise UmbelError(
            f"Expected one folder to resume, got --resume {resume} and --out {overrides['run.out']}. Leave --out out."
        )
    return load_config(None, {"run.out": str(resume), "run.resume": True})


def _loaded(file: Path | None, overrides: Mapping[str, Any], typed: Mapping[str, str]) -> Config:
    try:
        return load_config(file, overrides)
    except UmbelError as error:
        raise UmbelError(_blamed(str(error), file, typed)) from None


def _blamed(message: str, file: Path | None, typed: Mapping[str, str]) -> str:
    """The message with the options that were typed as the place of the problem, where they are.

    Args:
        message: Of `load_config`: place, problem, remedy.
        file: The TOML file; leaving an option out would not lead to the default but to what it says.
        typed: Options by key.
    """
    problem = _PROBLEM.fullmatch(message)
    if problem is None:
        return message
    what, key = problem["what"], problem["key"]
    of_key = [name for k, name in typed.items() if k == key or key.startswith(f"{k}.")]
    of_section = [name for k, name in typed.items() if k.startswith(f"{key}.")]
    names = of_key or of_section
    if not names:
        return message
    if file is not None:
        what = _LEAVE_IT_OUT.sub("Correct it.", what)
    return f"{', '.join(names)}: {what}"


def with_folder(config: Config, default_folder: Callable[[], Path]) -> Config:
    """The configuration with a run folder, chosen here so that whoever interrupts a run can be told of it."""
    if config.run.out is not None or config.run.resume:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"out": str(default_folder())})})


def _plain(key: str, value: Any) -> Any:
    if key == "data.target_range":
        parsed = _value(f"[{value}]")
        return parsed if isinstance(parsed, list) else value
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
