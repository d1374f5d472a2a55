"""Files of a release folder against the ledger: what is missing, changed, staged only or another run's is seen."""

from hashlib import sha256

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import UmbelError
from common.files import pack
from privacy.audit.releases import Releases, run_of, verify_release
from privacy.ledger import PrivacyLedger
from privacy.participation import mu_max_string

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DIGEST = "0f" * 32
EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "100",
    "clipping_norm": "1",
    "grid_scale": 65536,
    "groups": [{"name": "model", "size": 10, "share": "1"}],
    "denominator": 3,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}


@pytest.fixture
def release(tmp_path):
    """The release folder of run `b`, on a ledger that run `a` was charged to before.

    `a` committed one release, which is elsewhere; `b` committed two, one was aborted, one is open.
    """
    folder = tmp_path / "release"
    (folder / "rounds").mkdir(parents=True)
    with PrivacyLedger.create(
        folder / "ledger.jsonl",
        population="p",
        epsilon=1.0,
        delta=1e-6,
        mu_max=mu_max_string(1.0, 1e-6, 1),
        max_nodes_per_user=1,
        key=KEY,
    ) as ledger:
        for run in ("a", "b", "empty"):
            ledger.start(run, {}, DIGEST)
        sequences = []
        for run, server_round in (("a", 1), ("b", 1), ("b", 2)):
            data = f"{run} {server_round}".encode()
            sequences.append(ledger.reserve(run, server_round, EVENT, 3).sequence)
            ledger.commit(sequences[-1], sha256(data).hexdigest())
            if run == "b":
                path_of(folder, sequences[-1]).write_bytes(data)
        sequences.append(ledger.reserve("b", 3, EVENT, 3).sequence)
        ledger.abort(sequences[-1], "no_answer")
        sequences.append(ledger.reserve("b", 4, EVENT, 3).sequence)
    assert sequences == [4, 6, 8, 10, 12]
    return folder


def path_of(release, sequence):
    return release / "rounds" / f"{sequence:09d}.safetensors"


def verdict(release, run="b"):
    found = verify_release(release / "ledger.jsonl", Releases(folder=release / "rounds", run=run))
    return found.status == "failed", found.reason


def test_a_folder_as_it_was_left_passes(release):
    """The run's own releases are all there; those of the run before are elsewhere."""
    assert verdict(release) == (False, "")


@pytest.mark.parametrize("sequence", [6, 8])
def test_a_deleted_or_changed_release_is_seen(release, sequence):
    """A committed release of the run that is gone, or has other bytes, fails."""
    path_of(release, sequence).write_bytes(b"other")
    assert verdict(release)[0]
    path_of(release, sequence).unlink()
    assert verdict(release)[0]


@pytest.mark.parametrize("run", [None, "unheard"])
def test_a_folder_of_nobody_knows_whom_must_be_complete(release, run):
    """Where the run is not known, or not the ledger's, every committed release must be there."""
    failed, reason = verdict(release, run)
    assert failed
    assert "all 3 committed releases" in reason
    assert "got 2" in reason
    path_of(release, 4).write_bytes(b"a 1")
    assert verdict(release, run) == (False, "")
    path_of(release, 4).write_bytes(b"a 2")
    assert verdict(release, run)[0]


def test_another_runs_name_does_not_hide_a_deleted_release(release):
    """A folder that is said to be of a run without releases may not hold those of others."""
    path_of(release, 6).unlink()
    failed, reason = verdict(release, "empty")
    assert failed
    assert "run='empty'" in reason


@pytest.mark.parametrize(
    ("sequence", "words"), [(12, "staged, not committed"), (10, "aborted: no_answer"), (3, "RESERVE"), (99, "RESERVE")]
)
@pytest.mark.parametrize("run", ["b", None])
def test_bytes_that_nothing_signed_vouches_for_are_seen(release, sequence, words, run):
    """A file of a round that is open or aborted, or of no round, fails, whatever its bytes."""
    if run is None:
        path_of(release, 4).write_bytes(b"a 1")
    path_of(release, sequence).write_bytes(b"any")
    failed, reason = verdict(release, run)
    assert failed
    assert words in reason
    assert path_of(release, sequence).name in reason


def test_the_model_says_whose_run_it_is(tmp_path):
    """The run comes from the released model's facts; without a model it is unknown, with a broken one an error."""
    assert run_of(tmp_path) is None
    model = tmp_path / "model.safetensors"
    for facts, run in (({"run": "r"}, "r"), ({}, None)):
        model.write_bytes(pack({"beta": np.zeros(2)}, facts))
        assert run_of(tmp_path) == run
    model.write_bytes(b"broken")
    with pytest.raises(UmbelError):
        run_of(tmp_path)


@pytest.mark.parametrize("name", ["x", "6", "0000000006", "-00000006", "٠٠٠٠٠٠٠٠٦"])
def test_a_file_under_another_name_is_no_release(release, name):
    """Only the number of a RESERVE line, nine digits long, names a release."""
    (release / "rounds" / f"{name}.safetensors").write_bytes(b"b 1")
    failed, reason = verdict(release)
    assert failed
    assert "RESERVE" in reason
