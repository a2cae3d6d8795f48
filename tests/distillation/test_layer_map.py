"""Which states of the student learn from which of the teacher's."""

import pytest

from nemo_minitron.distillation.layer_map import Pair, layer_map
from nemo_minitron.errors import InputError

EMBEDDING = Pair("embedding", -1, -1)


@pytest.mark.parametrize(
    ("kept", "teacher", "blocks"),
    [
        ([0, 1, 2, 3, 8, 9], 10, [(3, 7)]),  # what layer 8 used to read is the output of layer 7
        ([0, 2, 3, 5], 6, [(0, 1), (2, 4)]),
        ([0, 1, 2], 6, [(2, 5)]),  # the last layers are gone: the final norm reads the last kept one
        (range(6), 6, [(3, 3)]),  # only widths were cut
        (range(2), 2, [(0, 0)]),
    ],
)
def test_automatic(kept, teacher, blocks):
    pairs = layer_map("auto", len(kept), teacher, list(kept))
    assert pairs == (EMBEDDING, *(Pair("block", s, t) for s, t in blocks))


def test_auto_of_equal_depth_needs_no_plan():
    assert layer_map("auto", 8, 8) == (EMBEDDING, Pair("block", 5, 5))


def test_pairs_by_hand():
    """The paper's: the output of layer 13 of 16 against layer 29 of 32, and the embedding."""
    pairs = layer_map("embedding, block:13:29,attention:0:0,block:13:29", 16, 32)
    assert pairs == (EMBEDDING, Pair("block", 13, 29), Pair("attention", 0, 0))
    assert [str(pair) for pair in pairs] == ["embedding", "block:13:29", "attention:0:0"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("auto", "no plan says which"),
        ("blok:1:2", "nearest|block"),
        ("block:1", "block:STUDENT_LAYER:TEACHER_LAYER"),
        ("block:1:x", "no pair of layers"),
        ("embedding:0:0:0", "write embedding"),
        ("block:4:2", "layer 4 of the student, whose last is 3"),
        ("mlp:3:8", "layer 8 of the teacher, whose last is 7"),
    ],
)
def test_refusals(text, said):
    with pytest.raises(InputError, match=said):
        layer_map(text, 4, 8)
