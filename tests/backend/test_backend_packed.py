"""Packed sequences on the twin: each sample of a row gives what it gives alone, whatever surrounds it."""

from types import SimpleNamespace

import bare_models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bare_models import VOCAB, tokens
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from tolerances import LAYOUT_GRADIENT_FP32, LOGITS_PICO_FP32

from nemo_minitron.backend.attention import Attention
from nemo_minitron.errors import InputError

pytestmark = pytest.mark.usefixtures("one_process")
LENGTHS = [5, 1, 11, 0, 4]  # an empty one, as NeMo pads its cu_seqlens
ROOM = [8, 2, 12, 0, 6]  # with padding behind each sample


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def params(lengths=LENGTHS, room=None, longest=None):
    own, padded = offsets(lengths), None if room is None else offsets(room)
    longest = longest or max(room or lengths)
    return PackedSeqParams("thd", own, own, padded, padded, longest, longest)


def starts(room):
    return offsets(room)[:-1].tolist()


def row(samples, room):
    """[1, sum of room]: the samples at their places, and token 0 between them; and the positions."""
    made = torch.zeros(1, sum(room), dtype=torch.int64)
    for start, sample in zip(starts(room), samples, strict=True):
        made[0, start : start + len(sample)] = sample
    return made, torch.cat([torch.arange(n) for n in room])[None]


def samples():
    return [tokens(1, seed=10 + i, length=n)[0] for i, n in enumerate(LENGTHS)]


# -- the model ---------------------------------------------------------------------------------------------
# Tried by hand: one causal mask over the row, and segments that begin at the unpadded offsets, fail here. Where
# max_seqlen is the row's length Megatron's rotary positions count on from sample to sample; they are relative.
@pytest.mark.parametrize("longest", [None, sum(ROOM)])
@pytest.mark.parametrize("room", [LENGTHS, ROOM], ids=["dense", "padded"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("qk_norm", {"window_size": (3, 0)}), ("nemotron", {}), ("moe", {}), ("mla", {}), ("mla", {"rope_type": "rope"})],
)
def test_a_packed_sample_is_the_sample_alone(kind, options, room, longest):
    (model,) = bare_models.build(kind, **options)
    together, positions = row(samples(), room)
    packed = params(room=None if room is LENGTHS else room, longest=longest)
    logits = model(together, positions, None, packed_seq_params=packed)
    got, alone = [], []
    for start, sample in zip(starts(room), samples(), strict=True):
        if len(sample):
            got.append(logits[0, start : start + len(sample)])
            alone.append(model(sample[None], torch.arange(len(sample))[None], None)[0])
    got, alone = torch.cat(got), torch.cat(alone)
    assert torch.allclose(got, alone, rtol=0, atol=LOGITS_PICO_FP32)
    target = tokens(1, seed=3, length=sum(LENGTHS))[0]
    gradients = [torch.autograd.grad(F.cross_entropy(x, target), list(model.parameters())) for x in (got, alone)]
    for name, ours, wanted in zip(dict(model.named_parameters()), *gradients, strict=True):
        assert (ours - wanted).abs().max() <= LAYOUT_GRADIENT_FP32 * wanted.abs().max(), name


def test_packing_matters():
    """The samples' logits change when the row is one sample, so the test above can fail."""
    (model,) = bare_models.build("qk_norm")
    together, positions = row(samples(), LENGTHS)
    one = model(together, positions, None)
    packed = model(together, positions, None, packed_seq_params=params())
    assert torch.allclose(one[0, :5], packed[0, :5], atol=LOGITS_PICO_FP32)
    assert (one[0, 6:] - packed[0, 6:]).abs().max() > 0.01
    assert together.max() < VOCAB


# -- core attention ----------------------------------------------------------------------------------------
def attention(mask_type=AttnMaskType.causal, **options):
    return Attention(bare_models.config("llama", **options), 1, mask_type, "self")


def qkv(length):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, heads, 8, generator=generator) for heads in (8, 4, 4)]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_block_diagonal(causal):
    """Against one softmax over the row in float64, with a block-diagonal mask."""
    query, key, value = qkv(sum(LENGTHS))
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = sample[:, None] == sample
    if causal:
        seen = seen.tril()
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double().repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    wanted = torch.einsum("hqk,khd->qhd", weights, value.double().repeat_interleave(2, 1)).flatten(1)
    kind = AttnMaskType.causal if causal else AttnMaskType.no_mask
    got = attention(kind)(query, key, value, torch.ones(1, 1, 1, 1).bool(), packed_seq_params=params())
    assert torch.allclose(got, wanted.float(), atol=1e-6)


def test_padding_attends_to_nothing_and_is_not_seen():
    query, key, value = qkv(sum(ROOM) + 3)  # three tokens after the last sample
    packed = params(room=ROOM)
    first = attention()(query, key, value, packed_seq_params=packed)
    own = torch.zeros(len(query), dtype=torch.bool)
    for start, length in zip(starts(ROOM), LENGTHS, strict=True):
        own[start : start + length] = True
    assert (first[~own] == 0).all()
    assert (first[own] != 0).any(1).all()
    key, value = (x.masked_fill(~own[:, None, None], 1e4) for x in (key, value))
    assert torch.equal(attention()(query, key, value, packed_seq_params=packed), first)


@pytest.mark.parametrize(
    ("change", "options", "bias", "words"),
    [
        ({"qkv_format": "sbhd"}, {}, None, "legal is 'thd'"),
        ({}, {"context_parallel_size": 2}, None, "context_parallel_size=2"),
        ({}, {}, torch.zeros(1), "bias"),
    ],
)
def test_what_cannot_be_packed_is_refused(change, options, bias, words):
    packed = params()
    for name, value in change.items():
        setattr(packed, name, value)
    made = attention()
    for name, value in options.items():
        setattr(made.config, name, value)
    with pytest.raises(InputError, match=words):
        made(*qkv(sum(LENGTHS)), packed_seq_params=packed, attention_bias=bias)


# -- NeMo's packed data ------------------------------------------------------------------------------------
@pytest.mark.nemo
@pytest.mark.slow
def test_nemos_packed_batch_runs(tmp_path):
    """Its data set's batch through its forward step; a sample's last token is a label alone, the row is padded."""
    from nemo.collections.llm.gpt.data.core import GPTSFTPackedDataset
    from nemo.collections.llm.gpt.model.base import gpt_forward_step

    rows = [tokens(1, seed=i, length=n)[0].tolist() for i, n in enumerate((7, 4, 9))]
    bins = [{"input_ids": [token for row in rows for token in row], "loss_mask": [1] * 20, "seq_start_id": [0, 7, 11]}]
    np.save(tmp_path / "packed.npy", bins, allow_pickle=True)
    made = GPTSFTPackedDataset(
        str(tmp_path / "packed.npy"),
        SimpleNamespace(eos_id=2, bos_id=1),
        return_cu_seqlen=True,
        max_seq_length=32,
        pad_to_max_length=True,
        prompt_template="{input} {output}",
        label_key="output",
        truncation_field="input",
        memmap_workers=1,
    )
    batch = made.collate_fn([made[0]])
    assert batch["cu_seqlens"][0].tolist() == [0, 6, 9, 17, 32, -1]
    (model,) = bare_models.build("qk_norm")
    losses = gpt_forward_step(model, batch)[0]
    for start, sample in zip((0, 6, 9), (torch.tensor(row) for row in rows), strict=True):
        length = len(sample) - 1
        alone = model(sample[None, :-1], torch.arange(length)[None], None, labels=sample[None, 1:])[0]
        assert torch.allclose(losses[start : start + length], alone, rtol=0, atol=LOGITS_PICO_FP32)
