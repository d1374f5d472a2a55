"""A real run on planted values: nothing it prints, logs or writes has them, but for the nodes' own stores.

The evaluation of a simulation may hold what it computed from the raw data, and is marked; it is not searched.
"""

import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from server.settings import RunFolder
from umbel.flower_engine import CHECKOUT

# Each occurs in one user's rows only: in range, in range, out of range, and in rows that are dropped.
TARGET, FEATURE, OUTSIDE, BAD = 7919.125, 6173.375, 51427.625, 5417.625
PERSON = "zq-quagga"
NUM_USERS = 24
# What the run computes of them first: features on [-1, 1], targets around the middle of their range.
SCALED = (2 * FEATURE / 10_000 - 1, TARGET - 5000)
PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
from umbel.cli import main
main()
"""


def write_table(path: Path) -> None:
    """Users with strange names, of whom three have values that are found nowhere else."""
    rng = np.random.default_rng(5)
    rows = [
        f"{PERSON}-{user:04d},{rng.uniform(0, 9000):.3f},{rng.uniform(-1, 1):.3f},{rng.uniform(1, 9000):.3f}"
        for user in range(NUM_USERS)
        for _ in range(8)
    ]
    rows += [f"{PERSON}-0003,{FEATURE},0.5,{TARGET}"] * 5
    rows += [f"{PERSON}-0004,{OUTSIDE},0.25,{OUTSIDE}", f"{PERSON}-0005,{BAD},nan,{BAD}", f"{PERSON}-0006,{BAD}"]
    rows += [f"{PERSON}-0007,1.5,0.5,{BAD}x", f"{PERSON}-0008,1.5,x{BAD},2.5"]
    path.write_text("user,x,z,target\n" + "\n".join(rows) + "\n")


def traces(data: bytes) -> list[str]:
    """Which of the planted values are in `data`: as text, or as numbers of four or eight bytes."""
    found = [
        name for name in (PERSON, *(str(value) for value in (TARGET, FEATURE, OUTSIDE, BAD))) if name.encode() in data
    ]
    found += [f"{value:.6g}" for value in SCALED if re.search(rb"(?<![\d.])" + f"{value:.6g}".encode(), data)]
    for value in (TARGET, FEATURE, OUTSIDE, BAD, *SCALED):
        found += [f"{value} as {form}" for form in ("<d", ">d", "<f") if struct.pack(form, value) in data]
    return found


def test_the_search_finds_what_is_planted(tmp_path):
    """Text and binary, also among other bytes."""
    write_table(tmp_path / "table.csv")
    assert traces((tmp_path / "table.csv").read_bytes()) == [PERSON, "7919.125", "6173.375", "51427.625", "5417.625"]
    assert traces(b"xx" + np.array([1.5, TARGET, 2.5]).tobytes()) == ["7919.125 as <d"]
    assert traces(b"offset 2919.12, not 12919.12") == ["2919.12"]
    assert traces(b"nothing 7919 of 2024") == []


def run(folder: Path, engine: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    """`umbel simulate` in a process of its own, every logger on, its temporary files kept in `folder`."""
    # Ray's sockets need a short path
    with tempfile.TemporaryDirectory(prefix="u", dir="/tmp") as temporary:
        environment = os.environ | {"TMPDIR": temporary, "PYTHONPATH": str(CHECKOUT), "HOME": str(folder / "home")}
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-c",
                    PROGRAM,
                    "simulate",
                    "--data",
                    str(folder / "table.csv"),
                    "--data-format",
                    "table",
                ),
                *("--target-range", "0,10000", "--on-bad-rows", "skip", "--engine", engine, "--nodes", "3"),
                *("--set", 'data.features=[{name="x", low=0.0, high=10000.0}, "z"]', "--rank", "1", "--sparsity", "1"),
                *("--rounds", "2", "--epsilon", "4", "--out", str(folder / "run"), *options),
            ],
            cwd=folder,
            env=environment,
            capture_output=True,
            check=False,
            timeout=400,
        )
        left = [path for path in Path(temporary).rglob("*") if path.is_file()]
        assert {str(path): traces(path.read_bytes()) for path in left if traces(path.read_bytes())} == {}
    return done


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("in-process", ()),
        ("in-process", ("--algorithm", "amht-lrs", "--format", "json", "--no-baselines")),
        ("flower", ("--no-baselines",)),
    ],
    ids=["gradient", "amht-lrs", "flower"],
)
def test_no_value_of_a_user_is_printed_logged_or_written(tmp_path, engine, options):
    """Standard output and error with all loggers at DEBUG, and every file but the nodes' and the evaluation's."""
    write_table(tmp_path / "table.csv")
    (tmp_path / "home").mkdir()
    done = run(tmp_path, engine, *options)
    assert done.returncode == 0, done.stderr.decode()
    assert b"DEBUG" in done.stderr or b"INFO" in done.stderr or engine == "flower"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "table.csv"]
    searched = [path for path in files if not private(path.relative_to(tmp_path))]
    folder = RunFolder(root=tmp_path / "run")
    assert {folder.metrics, folder.config, folder.model, tmp_path / "run" / "ledger.jsonl"} <= set(searched)
    assert engine != "flower" or tmp_path / "run" / "flower.log" in searched
    found = {path.relative_to(tmp_path).as_posix(): traces(path.read_bytes()) for path in searched}
    found |= {"stdout": traces(done.stdout), "stderr": traces(done.stderr)}
    assert {name: each for name, each in found.items() if each} == {}
    # the rows were read: four are bad, and two values are out of range
    assert re.search(rb"\b4\b[^\n]*row", done.stderr + done.stdout)


def private(path: Path) -> bool:
    return path.parts[:2] in {("run", "nodes"), ("run", "evaluation")}
