"""Megatron's layout of tensors: every element of a model in one place of every sharding."""

import re

import numpy as np
import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.sources.mapping import Shard, padded_vocab, pieces

ARCHITECTURE = Architecture(
    num_layers=2, hidden_size=10, ffn_hidden_size=12, num_attention_heads=8, num_query_groups=4, head_dim=3,
    vocab_size=13, qkv_bias=True, attention_output_bias=True, mlp_bias=True, qk_norm=True, normalization="layernorm",
)  # fmt: skip
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (10,),
    "self_attention.linear_qkv.layer_norm_bias": (10,),
    "self_attention.linear_qkv.weight": (48, 10),
    "self_attention.linear_qkv.bias": (48,),
    "self_attention.q_layernorm.weight": (3,),
    "self_attention.k_layernorm.weight": (3,),
    "self_attention.linear_proj.weight": (10, 24),
    "self_attention.linear_proj.bias": (10,),
    "mlp.linear_fc1.layer_norm_weight": (10,),
    "mlp.linear_fc1.layer_norm_bias": (10,),
    "mlp.linear_fc1.weight": (24, 10),
    "mlp.linear_fc1.bias": (24,),
    "mlp.linear_fc2.weight": (10, 12),
    "mlp.linear_fc2.bias": (10,),
}
NAMES = ["embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"]
NAMES += ["decoder.final_layernorm.bias", *(f"decoder.layers.{i}.{name}" for i in range(2) for name in LAYER)]


def covered(size):
    """How often each element of each canonical tensor lies somewhere, over all ranks of a group."""
    counts = {name: np.zeros(shape, int) for name, shape in ARCHITECTURE.shapes().items()}
    for rank in range(size):
        for name in NAMES:
            for piece in pieces(name, ARCHITECTURE, Shard(rank, size)):
                box = tuple(slice(a, b) for a, b in piece.box)
                counts[piece.tensor][box] += 1
                extents = [(b - a, d - c) for (a, b), (c, d) in zip(piece.box, piece.place, strict=True)]
                assert all(mine == theirs for mine, theirs in extents), piece
    return counts


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_element_is_somewhere_and_sharded_ones_once(size):
    replicated = ("norm", "o.bias", "down.bias")
    for name, count in covered(size).items():
        expected = size if any(word in name for word in replicated) else 1
        assert (count == expected).all(), name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["linear_qkv.weight", "linear_fc1.weight"])
def test_places_fill_a_fused_parameter_without_overlap(name, size):
    full = next(shape for key, shape in LAYER.items() if key.endswith(name))
    full_name = next(n for n in NAMES if n.endswith(name))
    for rank in range(size):
        local = np.zeros((full[0] // size, full[1]), int)
        for piece in pieces(full_name, ARCHITECTURE, Shard(rank, size)):
            local[tuple(slice(a, b) for a, b in piece.place)] += 1
        assert (local == 1).all()


def test_qkv_is_interleaved_by_group():
    found = pieces("decoder.layers.1.self_attention.linear_qkv.weight", ARCHITECTURE, Shard(1, 2))
    assert [(p.tensor, p.box[0], p.place[0]) for p in found[:4]] == [
        ("layers.1.q.weight", (12, 18), (0, 6)),
        ("layers.1.k.weight", (6, 9), (6, 9)),
        ("layers.1.v.weight", (6, 9), (9, 12)),
        ("layers.1.q.weight", (18, 24), (12, 18)),
    ]


def test_padding_of_the_vocabulary_lies_in_no_piece():
    assert padded_vocab(13, 4) == 16
    rows = [pieces(NAMES[0], ARCHITECTURE, Shard(rank, 4))[0].box[0] for rank in range(4)]
    assert rows == [(0, 4), (4, 8), (8, 12), (12, 13)]
    rows = [pieces(NAMES[0], ARCHITECTURE.replace(vocab_size=5), Shard(rank, 4))[0].box[0] for rank in range(4)]
    assert rows == [(0, 2), (2, 4), (4, 5), (5, 5)]


def test_the_second_copy_of_a_tied_embedding_is_the_embedding():
    tied = ARCHITECTURE.replace(tied_embeddings=True)
    assert pieces("output_layer.weight", tied)[0].tensor == "embedding.weight"
    assert pieces("output_layer.weight", ARCHITECTURE)[0].tensor == "head.weight"


def test_unclaimed_parameters_are_refused_by_name():
    with pytest.raises(InputError, match=r"decoder\.layers\.0\.mlp\.router\.weight"):
        pieces("decoder.layers.0.mlp.router.weight", ARCHITECTURE)
    assert pieces("decoder.layers.0.mlp.linear_fc1._extra_state", ARCHITECTURE) == []


# -- mixtures of experts ---------------------------------------------------------------------------------------
MIXTURE = Architecture(
    num_layers=2, hidden_size=10, ffn_hidden_size=12, num_attention_heads=8, num_query_groups=4, head_dim=3,
    vocab_size=13, num_moe_experts=4, moe_ffn_hidden_size=16, moe_shared_expert_intermediate_size=20,
    moe_shared_expert_gate=True, moe_layer_freq=(0, 1),
)  # fmt: skip
SEQUENTIAL = [f"experts.local_experts.{{e}}.linear_fc{i}.weight" for i in (1, 2)]
GROUPED = [f"experts.linear_fc{i}.weight{{e}}" for i in (1, 2)]
BESIDE = ["router.weight", "shared_experts.gate_weight", "shared_experts.linear_fc1.weight"]
BESIDE += ["shared_experts.linear_fc2.weight"]


def shards(tp, ep, etp):
    """The ranks of one copy of everything: `tp` x `ep` x `etp` places, of which jobs use some."""
    return [Shard(t, tp, e, ep, x, etp) for t in range(tp) for e in range(ep) for x in range(etp)]


@pytest.mark.parametrize("names", [SEQUENTIAL, GROUPED], ids=["sequential", "grouped"])
@pytest.mark.parametrize(("tp", "ep", "etp"), [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 1, 2), (2, 4, 1), (1, 2, 4)])
def test_every_element_of_a_mixture_is_somewhere(names, tp, ep, etp):
    """Experts lie on the ranks that share them once, whatever TP is; router and the gate on every rank."""
    counts = {n: np.zeros(s, int) for n, s in MIXTURE.shapes().items() if n.startswith("layers.1.")}
    for shard in shards(tp, ep, etp):
        local = [name.format(e=e) for name in names for e in range(4 // ep)] + BESIDE
        for name in local:
            for piece in pieces(f"decoder.layers.1.mlp.{name}", MIXTURE, shard):
                counts[piece.tensor][tuple(slice(a, b) for a, b in piece.box)] += 1
                assert [b - a for a, b in piece.box] == [b - a for a, b in piece.place]
    for name, count in counts.items():
        if ".experts." in name:
            assert (count == tp).all(), name
        elif "router" in name:
            assert (count == tp * ep * etp).all(), name
        elif "shared_expert" in name:
            assert (count == ep * etp).all(), name


def test_experts_are_numbered_over_expert_parallel_ranks():
    shard = Shard(rank=1, size=2, ep_rank=1, ep_size=2, etp_rank=1, etp_size=4)
    columns = (0, 10)
    first = pieces("decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight", MIXTURE, shard)
    assert [(p.tensor, p.box, p.place) for p in first] == [
        ("layers.1.experts.3.gate.weight", ((4, 8), columns), ((0, 4), columns)),
        ("layers.1.experts.3.up.weight", ((4, 8), columns), ((4, 8), columns)),
    ]
    assert first == pieces("decoder.layers.1.mlp.experts.linear_fc1.weight1", MIXTURE, shard)
    (second,) = pieces("decoder.layers.1.mlp.experts.linear_fc2.weight0", MIXTURE, shard)
    assert (second.tensor, second.box) == ("layers.1.experts.2.down.weight", (columns, (4, 8)))
    (shared,) = pieces("decoder.layers.1.mlp.shared_experts.linear_fc2.weight", MIXTURE, shard)
    assert (shared.tensor, shared.box) == ("layers.1.shared_expert.down.weight", (columns, (10, 20)))


@pytest.mark.parametrize(
    "name",
    [
        "mlp.experts.local_experts.2.linear_fc1.weight",  # two experts lie on a rank
        "mlp.experts.weight1",  # Megatron's old grouped experts
        "mlp.experts.linear_fc1.bias0",
        "mlp.router.bias",
        "mlp.shared_experts.linear_fc3.weight",
    ],
)
def test_unclaimed_parameters_of_mixtures_are_refused_by_name(name):
    with pytest.raises(InputError, match=re.escape(name)):
        pieces(f"decoder.layers.1.{name}", MIXTURE, Shard(ep_size=2))
