"""The log of a process: one line a record, public facts only."""

import json
import logging
import logging.config
import sys
from collections.abc import Iterator

import pytest

from common import logs
from common.errors import DataError, StorageError, UmbelError

ROW = "ann,42,17.5"


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The handlers and levels of this process, as before."""
    root, flwr = logging.getLogger(), logging.getLogger("flwr")
    ours = [logging.getLogger(name) for name in ("umbel", "server", "client", "privacy", "common")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in (root, flwr, *ours)]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def fail(error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger("client.test").exception("round failed")


def test_a_record_is_one_object_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time, level, logger, message and public extras; line breaks in a message do not make another record."""
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    logs.configure()
    logging.getLogger("umbel.rounds").info("round", extra={"round": {"round": 3, "answered": 2}})
    logging.getLogger("server.test").warning('two\n{"level":"INFO"}')
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "INFO",
        "logger": "umbel.rounds",
        "message": "round",
        "round": {"round": 3, "answered": 2},
    }
    assert (second["level"], second["message"]) == ("WARNING", 'two\n{"level":"INFO"}')


@pytest.mark.parametrize("kind", ["json", "text"])
def test_what_is_not_public_is_not_written(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither other extras, nor objects in public ones, nor the text, the cause and the source lines of an unforeseen
    exception, nor those of one about data."""
    monkeypatch.setenv(logs.FORMAT_VARIABLE, kind)
    logs.configure()
    logger = logging.getLogger("client.test")
    logger.info("hello", extra={"user": ROW, "round": {"object": type("Row", (), {"__repr__": lambda _: ROW})()}})
    for error in (ValueError(ROW), KeyError(ROW), DataError(ROW)):
        fail(error)
    try:
        raise RuntimeError(ROW) from ValueError(ROW)
    except RuntimeError:
        logger.exception("again")
    text = capsys.readouterr().err
    assert ROW not in text
    assert "(ROW)" not in text
    assert text.count("\n") == 5
    assert all(name in text for name in ("ValueError", "KeyError", "DataError", "RuntimeError", "test_logs.py"))


def test_our_own_errors_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of an error of ours that is not about data is written."""
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    logs.configure()
    fail(StorageError("Expected to write x, got No space left on device."))
    assert json.loads(capsys.readouterr().err)["error_message"] == "Expected to write x, got No space left on device."


def test_text_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    """In text no message can begin a line or move the cursor."""
    logs.configure("text")
    logging.getLogger("server.test").info("a\nb\x1b[2J", extra={"code": "busy"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r'INFO server.test: a\x0ab\x1b[2J code="busy"')


def test_the_level_is_ours_and_libraries_are_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """UMBEL_LOG_LEVEL is for our loggers; those of libraries, Flower's too, speak from WARNING on, once."""
    monkeypatch.setenv(logs.LEVEL_VARIABLE, "debug")
    logging.getLogger("flwr").addHandler(logging.StreamHandler(sys.stderr))
    logs.configure("text")
    logging.getLogger("client.test").debug("one")
    logging.getLogger("httpx").info("none")
    logging.getLogger("flwr").info("none")
    logging.getLogger("flwr").warning("two")
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == ["one", "two"]


def test_without_a_word_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither the environment nor the caller names a format, handlers stay as they are."""
    monkeypatch.delenv(logs.FORMAT_VARIABLE, raising=False)
    before = list(logging.getLogger().handlers)
    logs.configure()
    assert logging.getLogger().handlers == before


@pytest.mark.parametrize(("name", "value"), [("UMBEL_LOG", "xml"), ("UMBEL_LOG_LEVEL", "loud")])
def test_a_wrong_word_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that a variable cannot have is an error with both."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UmbelError, match=f"{name} .*{value}|{name} .*{value.upper()}"):
        logs.configure("text")
