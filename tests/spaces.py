"""What the tests of the search share: the papers' spaces, a model with every axis, brute force."""

import itertools

from test_architecture import of_table, smollm2

from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError
from nemo_minitron.search.sizes import student_architecture

NEMOTRON = of_table("nemotron-4-15b")
SPACE_8B = "layers=29,30,31,32;heads=32,48;ffn=2.5x,3x,3.5x,4x;hidden=4096,4608,5120,5632,6144"
SPACE_4B = "layers=29,30,31,32;heads=24,32,48;ffn=2.5x,3x,3.5x,4x;hidden=2560,3072,3584,4096,4608"
PICO = smollm2(
    num_layers=4, hidden_size=12, ffn_hidden_size=20, num_attention_heads=8, num_query_groups=4, head_dim=2,
    vocab_size=11,
)  # fmt: skip
MIXTURE = smollm2(
    num_layers=3, hidden_size=8, num_attention_heads=4, num_query_groups=2, head_dim=4, vocab_size=13,
    num_moe_experts=4, moe_ffn_hidden_size=6, moe_shared_expert_intermediate_size=5, moe_shared_expert_gate=True,
)  # fmt: skip


def brute_force(source, sizes):
    """Every legal combination of `sizes` (axis -> sizes), by the one that checks a user's sizes: (sizes, shape)."""
    for values in itertools.product(*sizes.values()):
        keep = dict(zip(sizes, values, strict=True))
        try:
            yield keep, student_architecture(source, keep)
        except InputError:
            continue


def shapes_of(space, rows=1 << 20):
    """Every shape of a space, as tuples in the order of the axes, in the order in which it comes."""
    for block in space.blocks(rows):
        yield from zip(*(column.tolist() for column in block.values()), strict=True)


def lengths(architecture, axes):
    return tuple(AXES[name].length(architecture) for name in axes)
