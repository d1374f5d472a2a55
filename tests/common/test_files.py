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
from common.files import (
    append_line,
    clear_leftovers,
    cut_torn_line,
    make_folder,
    pack,
    unpack,
    write_durably,
)


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
ARRAYS = DTYPES.flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))
)
FACTS = st.dictionaries(
    st.text(max_size=8),
    st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.booleans()),
    max_size=4,
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


def test_lines_are_added(tmp_path):
    """Each ends with a newline, in a file that need not be there."""
    for line in (b"one", b"", b"two"):
        append_line(tmp_path / "lines", line)
    assert (tmp_path / "lines").read_bytes() == b"one\n\ntwo\n"


def test_a_line_that_has_no_room_leaves_whole_lines(tmp_path, monkeypatch):
    """What was written of it is cut off again, so that the next line does not continue it."""
    path = tmp_path / "lines"
    append_line(path, b"one")

    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StorageError, match="No space left"):
        append_line(path, b"two")
    monkeypatch.undo()
    append_line(path, b"three")
    assert path.read_bytes() == b"one\nthree\n"


@pytest.mark.parametrize(("torn", "whole"), [(b"one\ntw", b"one\n"), (b"on", b""), (b"one\n", b"one\n"), (b"", b"")])
def test_a_torn_last_line_is_cut_off(tmp_path, torn, whole):
    """Whole lines stay, and a file that is not there is not made."""
    path = tmp_path / "lines"
    cut_torn_line(path)
    assert not path.exists()
    path.write_bytes(torn)
    cut_torn_line(path)
    assert path.read_bytes() == whole


def test_what_a_crash_left_staged_is_cleared(tmp_path):
    """Staging files go, all others stay."""
    write_durably(tmp_path / "file", b"data")
    (tmp_path / ".file.tmp").write_bytes(b"da")
    (tmp_path / "other.tmp").touch()
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["file", "other.tmp"]


def test_folders_are_made_with_those_above_them(tmp_path):
    """The mode is the innermost one's; again is no error; a file in the way is, with another place as the remedy."""
    make_folder(tmp_path / "a" / "b", mode=0o700)
    make_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UmbelError, match="Choose another place"):
            make_folder(path)


@pytest.mark.parametrize("is_link", [True, False])
def test_what_lies_in_the_place_of_a_staged_file_is_not_written_through(tmp_path, is_link):
    """Neither a link to another file nor a file that others can read gets the bytes of a secret."""
    other, staged = tmp_path / "other", tmp_path / ".key.tmp"
    other.write_text("kept")
    if is_link:
        staged.symlink_to(other)
    else:
        staged.touch()
        staged.chmod(0o666)
    write_durably(tmp_path / "key", b"secret", mode=0o600)
    found = (tmp_path / "key").lstat()
    assert (stat.S_ISREG(found.st_mode), found.st_mode & 0o777) == (True, 0o600)
    assert other.read_text() == "kept"
