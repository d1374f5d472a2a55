"""Small files: whole or not at all, and arrays with public facts that come back as they went."""

import errno
import os
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from common.errors import StorageError, UmbelError
from common.files import pack, unpack, write_durably


def test_writes_and_replaces(tmp_path):
    """New bytes replace old ones and nothing else is left in the folder."""
    path = tmp_path / "file"
    write_durably(path, b"old")
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_keys_are_private(tmp_path):
    """The mode asked for is the file's from its first byte on."""
    path = tmp_path / "key"
    write_durably(path, b"secret", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_failing_disk_leaves_the_old_bytes(tmp_path, monkeypatch, call):
    """Whatever fails, the old bytes stay, no staging file is left, and the error names the path and a remedy."""
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(StorageError, match="No space left on device"):
        write_durably(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


DTYPES = st.sampled_from([np.float64, np.float32, np.int64, np.int32, np.uint8, np.bool_])
ARRAYS = DTYPES.flatmap(lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)))
FACTS = st.dictionaries(
    st.text(max_size=8), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.booleans()), max_size=4
)


@given(arrays=st.dictionaries(st.text("abcU", min_size=1, max_size=4), ARRAYS, min_size=1, max_size=3), facts=FACTS)
def test_arrays_and_facts_come_back(tmp_path_factory, arrays, facts):
    """Any arrays, empty ones too, and any facts: the same bits, and equal inputs give equal bytes."""
    path = tmp_path_factory.mktemp("files") / "file"
    data = pack(arrays, facts)
    assert pack(dict(reversed(arrays.items())), dict(reversed(facts.items()))) == data
    path.write_bytes(data)
    read, said = unpack(path)
    assert said == facts
    assert read.keys() == arrays.keys()
    for name, value in arrays.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert read[name].tobytes() == np.ascontiguousarray(value).tobytes()


def test_the_order_in_memory_does_not_matter(tmp_path):
    """A transposed or strided array is written as what it means."""
    value = np.arange(24.0).reshape(2, 3, 4)
    for view in (value.transpose(2, 0, 1), value[:, ::2, ::-1], np.asfortranarray(value[0])):
        (tmp_path / "file").write_bytes(pack({"a": view}, {}))
        assert np.array_equal(unpack(tmp_path / "file")[0]["a"], view)


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 100, b"{}" * 20, pack({"a": np.ones(3)}, {})[:-1]])
def test_other_bytes_are_refused(tmp_path, data):
    """A torn or foreign file is named, not guessed at."""
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(UmbelError, match="as umbel wrote it"):
        unpack(path)


def test_a_missing_file_is_named(tmp_path):
    """The message has the path."""
    with pytest.raises(UmbelError, match="nothing-here"):
        unpack(tmp_path / "nothing-here")
