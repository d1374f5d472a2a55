"""What a test does inside a process of a federation, without a word of it in the programs themselves.

Python runs this module at the start of every process that has its folder on PYTHONPATH. `PLANS` names a folder and
`PROGRAM` who the process belongs to; `PROGRAM.json` in there says what is to happen, and where nothing is planned
nothing does:

    {"at": "reserved", "nth": 2, "do": "kill"}          end this process, as SIGKILL from outside would
    {"at": "reserved", "nth": 2, "do": "fill", "room": 4096}    no file may grow beyond so many bytes from now on
    {"clock": 3600}                                     the clock is so many seconds ahead
    {"forge": 100}                                      one byte of the first broadcast of a round is another one
"""

import datetime
import importlib.machinery
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

POINTS = {
    "server.roll_call": [("RollCall.wait", "waiting", "")],
    "privacy.ledger": [
        ("PrivacyLedger.start", "", "started"),
        ("PrivacyLedger.reserve", "reserving", "reserved"),
        ("PrivacyLedger.commit", "", "committed"),
    ],
    "server.training": [
        ("release", "", "noised"),
        ("save_checkpoint", "", "checkpointed"),
        ("append_line", "", "reported"),
        ("save_model", "", "modelled"),
    ],
    "server.app": [("_read", "answered {action}", ""), ("_write_outcome", "ending", "")],
    "common.wire": [("request", "", "request")],
    "flwr.superlink.grid.http_grid": [("HttpGrid.push_messages", "", "asked {action}")],
    "client.store": [("DeviceStore.charge", "computed", "charged")],
    "client.node": [("FlowerLink.fetch", "found {action}", ""), ("FlowerLink.push", "", "sent {action}")],
}
"""Functions by module, and what it is called when they are entered and left."""


class Inside:
    """A plan at work."""

    def __init__(self, plan):
        self.plan, self.left, self.action = plan, plan.get("nth", 1), ""

    def passes(self, point):
        """Do what is planned, if this is the moment."""
        if point.format(action=self.action) != self.plan.get("at"):
            return
        self.left -= 1
        if self.left != 0:
            return
        if self.plan["do"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.plan["room"], self.plan["room"]))

    def watch(self, module):
        """Put points into a module that was just loaded."""
        for path, before, after in POINTS[module.__name__]:
            owner = module
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, name, self.watched(getattr(owner, name), before, after))
        if module.__name__ == "server.app" and "forge" in self.plan:
            ask, place = module.FlowerNodes.ask, self.plan["forge"]

            def forged(nodes, node_ids, action, payload, signature, timeout):  # noqa: PLR0917 (as it is called)
                if action == "train.contribute":
                    first, *node_ids = node_ids
                    other = payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]
                    yield from ask(nodes, [first], action, other, signature, timeout)
                yield from ask(nodes, node_ids, action, payload, signature, timeout)

            module.FlowerNodes.ask = forged

    def watched(self, function, before, after):
        """A function with points before and after it."""

        def watched(*arguments, **options):
            work = arguments[1] if len(arguments) > 1 else None
            self.action = options.get("action") or getattr(work, "action", self.action)
            self.passes(before)
            result = function(*arguments, **options)
            self.passes(after)
            return result

        return watched

    def around_renaming_of_releases(self):
        """Put points before and after the step that makes a staged release one."""
        replace = os.replace

        def watched(source, target):
            release = Path(target).parent.name == "rounds"
            self.passes("staged" if release else "")
            replace(source, target)
            self.passes("renamed" if release else "")

        os.replace = watched


class Finder:
    """Loads what is watched as anybody would, and puts points into it."""

    def __init__(self, inside):
        self.inside, self.looking = inside, False

    def find_spec(self, name, path=None, target=None):
        """The module's specification, with a loader that puts points into it."""
        if name not in POINTS or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def loaded(module):
            run(module)
            self.inside.watch(module)

        spec.loader.exec_module = loaded
        return spec


def shift_clock(seconds):
    """Put the clock ahead, for all that is loaded from now on."""
    real_time, real_time_ns, real = time.time, time.time_ns, datetime.datetime
    time.time = lambda: real_time() + seconds
    time.time_ns = lambda: real_time_ns() + int(seconds * 1e9)

    class Shifted(real):
        """A time, of which now is another."""

        @classmethod
        def now(cls, tz=None):
            """The time on this clock."""
            return real.now(tz) + datetime.timedelta(seconds=seconds)

    datetime.datetime = Shifted


def plan_of_this_process():
    """What is to happen here."""
    if (program := os.environ.get("PROGRAM")) is None:
        return None
    is_app = any("flwr-serverapp" in part for part in sys.orig_argv)
    try:
        plan = json.loads((Path(os.environ["PLANS"]) / f"{program}.json").read_text())
    except OSError:
        return None
    return plan if is_app or program != "superexec" else None


if (found := plan_of_this_process()) is not None:
    if "clock" in found:
        shift_clock(found["clock"])
    inside = Inside(found)
    inside.around_renaming_of_releases()
    sys.meta_path.insert(0, Finder(inside))
