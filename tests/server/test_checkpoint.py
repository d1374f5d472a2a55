"""Checkpoints: what is read is, bit for bit, what was written."""

import os
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import DataSchema
from common.errors import StorageError, UmbelError
from common.files import pack, unpack
from common.model import SharedModel
from server.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_model,
    load_schema,
    save_checkpoint,
    save_model,
    save_schema,
)
from server.initialization import regularized_moment
from server.layout import contribution_layout
from server.rounds import ServerState, apply_round, initial_state, public_metric


def random_state(seed, d=4, r=2):
    rng = np.random.default_rng(seed)
    model = SharedModel(
        beta=rng.standard_normal(d),
        U=rng.standard_normal((d, r)),
        b_variance=float(rng.exponential()),
        noise_variance=float(rng.exponential()),
    )
    return replace(
        initial_state(model, regularized_moment(np.eye(d)), None),
        server_round=7,
        velocity=rng.standard_normal((d, r + 1)),
        elapsed=float(rng.exponential()),
        U_noise=float(rng.exponential()),
        reliability_sum=float(rng.exponential()),
        effective_examples=float(rng.exponential()),
        clipping_norm=float(rng.exponential()),
    )


def assert_same(a: ServerState, b: ServerState) -> None:
    for field in fields(a):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name == "model":
            for part in fields(ours):
                assert np.array_equal(getattr(ours, part.name), getattr(theirs, part.name)), part.name
        else:
            assert np.array_equal(ours, theirs), field.name
            assert np.asarray(ours).dtype == np.asarray(theirs).dtype, field.name


@given(seed=st.integers(0, 2**32), d=st.integers(1, 5), r=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_state_comes_back_bit_for_bit(tmp_path_factory, seed, d, r):
    """Every float of a state survives the disk, and so does the sequence number."""
    folder = tmp_path_factory.mktemp("checkpoints")
    state = random_state(seed, d, min(r, d))
    saved = Checkpoint(state=state, sequence=12, ledger_sequence=13, ledger_head="ab" * 32)
    save_checkpoint(folder, saved)
    found = load_checkpoint(folder)
    assert found is not None
    assert (found.ledger_sequence, found.ledger_head) == (13, "ab" * 32)
    assert_same(state, found.state)
    assert found.sequence == 12


def test_a_resumed_run_takes_the_same_step(tmp_path):
    """From disk or from memory, also where memory is in Fortran order, the next state is the same bits."""
    layout = contribution_layout(9, 4, private=True)
    rng = np.random.default_rng(0)
    state = random_state(1, 9, 4)
    for sequence in range(3):
        save_checkpoint(tmp_path, Checkpoint(state=state, sequence=sequence))
        found = load_checkpoint(tmp_path)
        assert found is not None
        noised = rng.integers(-(2**20), 2**20, layout.size)
        options = {
            "layout": layout, "clipping_norm": state.clipping_norm, "noise_multiplier": 2.0, "denominator": 100,
            "adapt_clipping": True, "family": "squared", "sparsity": 2,
        }  # fmt: skip
        assert np.array_equal(public_metric(state, "squared"), public_metric(found.state, "squared"))
        next_state = apply_round(state, noised, **options)
        assert_same(next_state, apply_round(found.state, noised, **options))
        state = next_state


def test_the_newest_counts_and_two_are_kept(tmp_path):
    """Sequence numbers order checkpoints; the last two stay, for the one being written."""
    for sequence in (3, 5, 12, 100):
        save_checkpoint(tmp_path, Checkpoint(state=random_state(sequence), sequence=sequence))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.sequence == 100
    assert_same(found.state, random_state(100))
    assert len(list(tmp_path.iterdir())) == 2


def test_no_checkpoint_is_none(tmp_path):
    """A new run, or a folder that is not there yet."""
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """A checkpoint that cannot be written leaves the one before."""
    save_checkpoint(tmp_path, Checkpoint(state=random_state(1), sequence=1))

    def fails(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StorageError):
        save_checkpoint(tmp_path, Checkpoint(state=random_state(2), sequence=2))
    monkeypatch.undo()
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.sequence == 1


def test_a_torn_checkpoint_is_refused(tmp_path):
    """Half a file is not a state."""
    save_checkpoint(tmp_path, Checkpoint(state=random_state(1), sequence=1))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UmbelError, match="Restore or remove"):
        load_checkpoint(tmp_path)


def test_a_model_comes_back(tmp_path):
    """With the public facts that were written beside it."""
    model = random_state(3).model
    save_model(tmp_path / "model", model, {"run": "r", "sparsity": 2, "feature_names": ["a", "ü"]})
    found, facts = load_model(tmp_path / "model")
    assert np.array_equal(found.U, model.U)
    assert np.array_equal(found.beta, model.beta)
    assert (found.b_variance, found.noise_variance) == (model.b_variance, model.noise_variance)
    assert facts == {"run": "r", "sparsity": 2, "feature_names": ["a", "ü"]}


def test_a_schema_comes_back(tmp_path):
    """Every field, as its own type."""
    schema = DataSchema(
        feature_names=("a", "b"), feature_second_moment=np.array([[1.0, 0.1], [0.1, 2.0]]),
        target_range=(-1.0, 1 / 3), target_offset=3.5, feature_bound=4.0,
    )  # fmt: skip
    save_schema(tmp_path / "schema", schema)
    found = load_schema(tmp_path / "schema")
    assert np.array_equal(found.feature_second_moment, schema.feature_second_moment)
    for name in ("feature_names", "target_range", "target_offset", "feature_bound"):
        assert getattr(found, name) == getattr(schema, name)


@pytest.mark.parametrize(("field", "value"), [("kind", None), ("U_noise", None), ("kind", "other"), ("newer", 1.0)])
def test_a_checkpoint_of_another_version_is_refused_with_a_remedy(tmp_path, field, value):
    """A state with other fields is no reason for a traceback, nor to go on from a guess."""
    save_checkpoint(tmp_path, Checkpoint(state=random_state(0), sequence=1))
    (path,) = tmp_path.iterdir()
    arrays, facts = unpack(path)
    facts = {name: kept for name, kept in facts.items() if name != field} | ({} if value is None else {field: value})
    path.write_bytes(pack(arrays, facts))
    with pytest.raises(UmbelError, match="Resume with the version"):
        load_checkpoint(tmp_path)
