"""Sizes of the rounds of iterative cutting."""

import itertools

import pytest
from spaces import MIXTURE, NEMOTRON, PICO

from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError
from nemo_minitron.search.rounds import round_sizes
from nemo_minitron.search.sizes import student_architecture


def test_the_papers_steps():
    """2407.14679: hidden 6144 -> 4096 in one, two and four rounds."""
    for rounds, sizes in ((1, [4096]), (2, [5120, 4096]), (4, [5632, 5120, 4608, 4096])):
        assert round_sizes(NEMOTRON, {"hidden": 4096}, rounds) == [{"hidden": size} for size in sizes]


@pytest.mark.parametrize(
    ("keep", "rounds", "first"),
    [
        ({"ffn": 24576 - 384}, 2, {"ffn": 24384}),  # 192 a round, a multiple of 64
        ({"ffn": 24576 - 192}, 2, {"ffn": 24512}),  # 96 a round: 24480 to a multiple of 64, half up
        ({"ffn": 24576 - 6}, 2, {"ffn": 24574}),  # 3 a round: 24573 to a multiple of 2
        ({"ffn": 24576 - 2}, 2, {"ffn": 24575}),
        ({"layers": 29}, 2, {"layers": 31}),  # 30.5
        ({"heads": 32}, 2, {"heads": 40}),
        ({"heads": 24, "query_groups": 4}, 2, {"heads": 36, "query_groups": 6}),
        ({"heads": 16, "query_groups": 4}, 2, {"heads": 30, "query_groups": 6}),
        ({"query_groups": 4}, 2, {"query_groups": 6}),
        ({"hidden": 6144, "layers": 30}, 2, {"hidden": 6144, "layers": 31}),
    ],
)
def test_sizes_after_the_first_round(keep, rounds, first):
    assert round_sizes(NEMOTRON, keep, rounds) == [first, keep]


EVERYTHING = {"hidden": 4099, "ffn": 9216, "heads": 16, "query_groups": 4, "layers": 17}


@pytest.mark.parametrize(
    ("source", "keep", "rounds"),
    [
        *((NEMOTRON, EVERYTHING, rounds) for rounds in (2, 3, 5, 7)),
        *((MIXTURE, {"hidden": 5, "expert_ffn": 4, "experts": 3}, rounds) for rounds in (2, 3)),
    ],
)
def test_every_round_is_legal_and_cuts_on(source, keep, rounds):
    sizes = round_sizes(source, keep, rounds)
    models = [source, *(student_architecture(source, size) for size in sizes)]
    assert models[-1] == student_architecture(source, keep)
    for before, after in itertools.pairwise(models):
        assert after == student_architecture(before, {name: AXES[name].length(after) for name in keep})
        assert after.parameters() < before.parameters()


@pytest.mark.parametrize(
    ("keep", "rounds", "words"),
    [
        ({"layers": [0, 1, 2]}, 2, "the layers that stay are listed"),
        ({"layers": PICO.num_layers - 2}, 3, "rounds=3 leaves some round nothing.*nearest legal number is 2"),
        ({"ffn": PICO.ffn_hidden_size}, 2, "the nearest legal number is 1"),
        ({"ffn": PICO.ffn_hidden_size + 1}, 2, "is not legal"),
    ],
)
def test_rounds_refused(keep, rounds, words):
    with pytest.raises(InputError, match=words):
        round_sizes(PICO, keep, rounds)
