"""Small checks of a machine and of files, for `umbel doctor`: each gives a record and changes nothing."""

import http.client
import re
import shutil
import socket
import ssl
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from cryptography.x509 import Certificate
from packaging.requirements import Requirement

from common.errors import UmbelError
from server import certificates

Status = Literal["ok", "warn", "fail"]

# Flower takes a message of a node whose clock is at most 5 s ahead of the server's and 305 s behind it.
MOST_AHEAD, MOST_BEHIND = 5.0, 305.0
_NEARLY_AHEAD, _NEARLY_BEHIND = 2.0, 60.0
_TIMEOUT = 5.0
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME
_BAD_DATES = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_PACKAGES = ("flwr", "cryptography", "numpy", "pydantic")
_VARIABLE = re.compile(r"(?<!\$)\$(?:\{(\w+)(:?[-?+][^}]*)?\}|(\w+))")


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: "ok"; "warn", it works and should be seen to; or "fail", it does not work.
        message: What was found.
        remedy: What to do about it; empty if nothing.
    """

    name: str
    status: Status
    message: str
    remedy: str = ""


def ok(name: str, message: str) -> Check:
    """Nothing to do."""
    return Check(name=name, status="ok", message=message)


def warn(name: str, message: str, remedy: str) -> Check:
    """It works, and should be seen to."""
    return Check(name=name, status="warn", message=message, remedy=remedy)


def fail(name: str, message: str, remedy: str) -> Check:
    """It does not work."""
    return Check(name=name, status="fail", message=message, remedy=remedy)


def run(name: str, function: Callable[[], Iterable[Check]]) -> list[Check]:
    """The records of one check; an error in it is a record too."""
    try:
        return list(function())
    except UmbelError as error:
        return [fail(name, str(error), "See the message.")]
    except OSError as error:
        return [fail(name, f"{error.filename or 'a file'}: {error.strerror}.", "Correct its permissions.")]


def check_certificate(name: str, certificate: Certificate, now: datetime, remedy: str) -> Check:
    """Whether a certificate is valid now and for some time."""
    until = certificates.expiry(certificate)
    if now < certificate.not_valid_before_utc:
        return fail(name, f"valid only from {certificate.not_valid_before_utc:%Y-%m-%d}.", "Set this machine's clock.")
    if until <= now:
        return fail(name, f"ended on {until:%Y-%m-%d}: nobody can connect.", remedy)
    if until < now + certificates.EXPIRES_SOON:
        return warn(name, f"ends on {until:%Y-%m-%d}, in {(until - now).days} days.", remedy)
    return ok(name, f"valid until {until:%Y-%m-%d}.")


def check_private(paths: Iterable[Path]) -> Iterator[Check]:
    """Whether nobody but its owner can read what is secret."""
    present = [path for path in paths if path.exists()]
    open_ones = [path for path in present if stat.S_IMODE(path.stat().st_mode) & 0o077]
    for path in open_ones:
        mode = stat.S_IMODE(path.stat().st_mode)
        yield fail("permissions", f"{path} can be read by others (mode {mode:04o}).", f"Run chmod go-rwx {path}.")
    if not open_ones:
        yield ok("permissions", f"{len(present)} secret files and folders, for their owner only.")


def check_versions() -> Iterator[Check]:
    """Whether this program's packages are those it was made for."""
    try:
        pins = {pin.name: pin for pin in map(Requirement, requires("umbel") or ()) if pin.marker is None}
        own = version("umbel")
    except PackageNotFoundError:
        yield warn("versions", "umbel runs from a checkout that is not installed.", "Run make setup.")
        return
    found = {"umbel": own, "Python": ".".join(map(str, sys.version_info[:3]))}
    wrong = []
    for name in _PACKAGES:
        found[name] = version(name)
        if name in pins and not pins[name].specifier.contains(found[name], prereleases=True):
            wrong.append(fail("versions", f"{name} {found[name]}, not {pins[name].specifier}.", "Run make setup."))
    yield from wrong or [ok("versions", ", ".join(f"{name} {value}" for name, value in found.items()) + ".")]


def check_writable(folders: Iterable[Path]) -> Iterator[Check]:
    """Whether files can be made where they will have to be."""
    fine = []
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"umbel")
            fine.append(folder.name)
        except OSError as error:
            yield fail("writable", f"{folder}: {error.strerror}.", "Make it writable for the user who runs umbel.")
    if fine:
        yield ok("writable", f"{', '.join(fine)}.")


def check_disk(folder: Path, needed: int, what: str) -> Check:
    """Whether there is room for `needed` bytes, and for ten times as much in case of error."""
    free = shutil.disk_usage(folder).free
    message = f"{size_in_words(free)} free; {what} takes about {size_in_words(needed)}."
    if free < needed:
        return fail("disk", message, f"Make room under {folder}.")
    if free < 10 * needed:
        return warn("disk", message, f"Make room under {folder}.")
    return ok("disk", message)


def size_in_words(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server said.

    Attributes:
        skew: How far this machine's clock is ahead of the server's, in seconds; None if it did not say.
        problem: What is wrong with its certificate, or "".
    """

    skew: float | None
    problem: str = ""


def call(address: str, authority: Path) -> Answer | None:
    """Ask a server over TLS for anything, without credentials.

    Args:
        address: "host:port".
        authority: Who must have signed its certificate.

    Returns:
        What came back, or None where nobody answers.
    """
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=authority)
    problem = ""
    for _ in range(2):
        connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=_TIMEOUT, context=context)
        try:
            connection.request("GET", "/")
            return Answer(skew=_skew(connection.getresponse().getheader("Date")), problem=problem)
        except ssl.SSLCertVerificationError as error:
            problem = error.verify_message
            if error.verify_code not in _BAD_DATES:
                return Answer(skew=None, problem=problem)
            context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)  # to learn whether it is this machine's clock
        except ssl.SSLError as error:
            return Answer(skew=None, problem=error.reason or "no TLS")
        except http.client.HTTPException:
            return Answer(skew=None)
        except OSError:
            return None
        finally:
            connection.close()
    return Answer(skew=None, problem=problem)


def is_free(port: int) -> bool:
    """Whether a program can listen on this port of loopback."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_clock(skew: float | None) -> Check:
    """Whether a server takes what a node with this clock signs.

    Args:
        skew: How far the node's clock is ahead, in seconds; None if it could not be compared.
    """
    remedy = "Set the clock of this device, and keep it right with NTP."
    if skew is None:
        return warn("clock", "not compared, for the server did not say its time.", "Compare it by hand.")
    words = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's"
    if not -MOST_BEHIND < skew < MOST_AHEAD:
        return fail("clock", f"{words}: the server would refuse this node.", remedy)
    if not -_NEARLY_BEHIND < skew < _NEARLY_AHEAD:
        return warn("clock", f"{words}; it takes at most {MOST_AHEAD:g} s ahead, {MOST_BEHIND:g} s behind.", remedy)
    return ok("clock", "that of the server.")


def check_order(last: datetime, now: datetime) -> Check:
    """Whether this machine's clock has gone backwards since the ledger's last line."""
    if now < last - timedelta(seconds=1):
        return fail("clock", f"before the ledger's last line of {last:%Y-%m-%d %H:%M:%S} UTC.", "Set the clock.")
    return ok("clock", f"after the ledger's last line; nodes must be within {MOST_AHEAD:g} s ahead of it.")


def variables_of(compose: str) -> tuple[set[str], set[str]]:
    """Variables that a compose file uses, and those of them that have no default."""
    used = [
        (match[1] or match[3], match[2] or "")
        for line in compose.splitlines()
        if not line.lstrip().startswith("#")
        for match in _VARIABLE.finditer(line)
    ]
    return {name for name, _ in used}, {name for name, rest in used if "-" not in rest[:2]}


def assignments(environment: str) -> dict[str, str]:
    """What an environment file sets."""
    pairs = (line.partition("=") for line in environment.splitlines() if not line.lstrip().startswith("#"))
    return {name.strip(): value for name, equals, value in pairs if equals}


def _skew(date: str | None) -> float | None:
    """How far the clock is ahead of a Date header, which is cut to whole seconds."""
    if date is None:
        return None
    try:
        return time.time() - (parsedate_to_datetime(date).timestamp() + 0.5)
    except ValueError:
        return None
