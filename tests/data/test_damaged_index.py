"""An index of documents that lies about its sizes, its dtype or the place of its documents."""

import struct

import mutations_of_files as mutations
import numpy as np
import pytest

from nemo_minitron.data.index_file import read_index
from nemo_minitron.errors import InputError


@pytest.fixture
def idx(tmp_path):
    """Three documents of 4, 0 and 5 tokens of int32, by hand."""
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 4)
    numbers = [np.array([4, 0, 5], "<i4"), np.array([0, 16, 16], "<i8"), np.array([0, 1, 2, 3], "<i8")]
    (tmp_path / "t.idx").write_bytes(head + b"".join(array.tobytes() for array in numbers))
    return tmp_path / "t.idx"


def test_a_whole_index(idx):
    ends, dtype = read_index(idx, 36)
    assert (ends.tolist(), dtype.name) == ([4, 4, 9], "int32")
    with pytest.raises(InputError, match="do not belong together"):
        read_index(idx, 40)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"X", "does not begin like one"), (9, b"\x02", "version 2"), (17, b"\x06", "kind 6"),
        (17, b"\xff", "kind 255"),
        (18, b"\xff" * 8, "it should have"), (26, b"\xff" * 8, "it should have"), (18, b"\x02", "it should have"),
        (34, b"\x05", "do not lie end to end"), (38, b"\xff\xff\xff\xff", "a document of -1 tokens"),
        (46, b"\x01", "do not lie end to end"), (70, b"\x05", "not in order"), (94, b"\x09", "not in order"),
    ],
)  # fmt: skip
def test_an_index_that_lies(idx, at, value, words):
    data = bytearray(idx.read_bytes())
    data[at : at + len(value)] = value
    idx.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_index(idx, 36)


def test_damaged_indexes(idx):
    refused = []
    for data in mutations.of_bytes(idx.read_bytes(), 300, seed="idx"):
        idx.write_bytes(data)
        mutations.tries(lambda file: read_index(file, 36), idx, refused)
    assert len(refused) > 200
