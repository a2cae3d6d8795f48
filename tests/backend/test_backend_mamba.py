"""Mamba-2 without CUDA kernels: the scan against its recurrence, position by position, and Megatron's own mixer."""

import bare_models
import megatron.core.ssm.mamba_mixer as mixer
import pytest
import torch
import torch.nn.functional as F
from tolerances import SCAN_FLOAT64, SCAN_FP32

from nemo_minitron.backend.mamba import GatedNorm, convolve_and_scan, scan
from nemo_minitron.errors import InputError

BATCH, LENGTH, HEADS, GROUPS, CHANNELS, STATE, WIDTH = 2, 11, 6, 2, 5, 3, 4
INNER, CONVOLVED = HEADS * CHANNELS, HEADS * CHANNELS + 2 * GROUPS * STATE


def tensors(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def inputs(dtype=torch.float64):
    """x, dt, decay, keys, queries, D, z, dt_bias, states to start with."""
    x, dt, decay, *rest = tensors(
        (BATCH, LENGTH, HEADS, CHANNELS), (BATCH, LENGTH, HEADS), (HEADS,), (BATCH, LENGTH, GROUPS, STATE),
        (BATCH, LENGTH, GROUPS, STATE), (HEADS,), (BATCH, LENGTH, HEADS, CHANNELS), (HEADS,),
        (BATCH, HEADS, CHANNELS, STATE), dtype=dtype,
    )  # fmt: skip
    return [x, dt, (-decay.detach().exp()).requires_grad_(), *rest]


def recurrence(x, dt, decay, keys, queries, D, z, dt_bias, state):
    """The definition: one position after another, one head after another."""
    dt, rows = F.softplus(dt + dt_bias), []
    for position in range(x.shape[1]):
        new, heads = [], []
        for head in range(x.shape[2]):
            group, step = head // (x.shape[2] // keys.shape[2]), dt[:, position, head, None, None]
            added = step * x[:, position, head, :, None] * keys[:, position, group, None, :]
            new.append(state[:, head] * (step * decay[head]).exp() + added)
            y = (new[-1] * queries[:, position, group, None, :]).sum(-1) + D[head] * x[:, position, head]
            heads.append(y * F.silu(z[:, position, head]))
        state = torch.stack(new, 1)
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows, 1), state


def chunked(x, dt, decay, keys, queries, D, z, dt_bias, state, size):
    options = {"dt_softplus": True, "return_final_states": True, "initial_states": state}
    return scan(x, dt, decay, keys, queries, size, D=D, z=z, dt_bias=dt_bias, **options)


def with_gradients(run, given):
    """What `run` gives and the gradients of all inputs."""
    given = [x.detach().clone().requires_grad_() for x in given]
    outputs = run(*given)
    sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outputs).backward()
    return [*outputs, *(x.grad for x in given)]


@pytest.mark.parametrize("size", [1, 4, 5, 64])  # 4 and 5 leave a part of a chunk, 64 is longer than the sample
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, SCAN_FLOAT64), (torch.float32, SCAN_FP32)])
def test_the_scan_is_the_recurrence_forward_and_backward(size, dtype, tolerance):
    wanted = with_gradients(recurrence, inputs())
    got = with_gradients(lambda *given: chunked(*given, size), [x.to(dtype) for x in inputs()])
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype is dtype
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_sample_in_two_parts_is_the_whole_one():
    x, dt, decay, keys, queries, D, z, dt_bias, state = (tensor.detach() for tensor in inputs())
    whole, end = chunked(x, dt, decay, keys, queries, D, z, dt_bias, state, 4)
    parts = []
    for at in (slice(0, 6), slice(6, LENGTH)):
        cut = (x[:, at], dt[:, at], decay, keys[:, at], queries[:, at], D, z[:, at], dt_bias, state)
        part, state = chunked(*cut, 4)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=SCAN_FLOAT64, atol=SCAN_FLOAT64)
    assert torch.allclose(state, end, rtol=SCAN_FLOAT64, atol=SCAN_FLOAT64)


def fused_inputs(dtype=torch.float64):
    projected, weight, bias, dt_bias, decay, skip = tensors(
        (BATCH, LENGTH, INNER + CONVOLVED + HEADS), (CONVOLVED, WIDTH), (CONVOLVED,), (HEADS,), (HEADS,),
        (HEADS, CHANNELS), dtype=dtype,
    )  # fmt: skip
    return [projected, weight, bias, dt_bias, (-decay.detach().exp()).requires_grad_(), skip]


@pytest.mark.parametrize("by_channel", [False, True])
def test_the_fused_step_convolves_each_channel_and_scans(by_channel):
    projected, weight, bias, dt_bias, decay, skip = fused_inputs()
    skip = skip if by_channel else skip[:, 0]
    got = convolve_and_scan(
        projected, weight, bias, dt_bias, decay, D=skip, chunk_size=4, activation="silu",
        headdim=None if by_channel else CHANNELS, ngroups=GROUPS, norm_before_gate=False,
    )  # fmt: skip
    z, before, dt = projected.split([INNER, CONVOLVED, HEADS], -1)
    after = torch.zeros_like(before)
    for position in range(LENGTH):
        for back in range(min(WIDTH, position + 1)):
            after[:, position] = after[:, position] + weight[:, WIDTH - 1 - back] * before[:, position - back]
    x, keys, queries = F.silu(after + bias).split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
    state = torch.zeros(BATCH, HEADS, CHANNELS, STATE, dtype=torch.float64)
    parts = (x.unflatten(-1, (HEADS, -1)), dt, decay, keys.unflatten(-1, (GROUPS, -1)))
    wanted, _ = recurrence(
        *parts, queries.unflatten(-1, (GROUPS, -1)), skip, z.unflatten(-1, (HEADS, -1)), dt_bias, state
    )
    assert torch.allclose(got, wanted.flatten(-2), rtol=SCAN_FLOAT64, atol=SCAN_FLOAT64)


def test_the_scan_computes_in_fp32_and_rounds_once():
    given = [x.detach().bfloat16() for x in inputs()]
    wanted, _ = recurrence(*(x.double() for x in given))
    got, _ = chunked(*given, 4)
    assert got.dtype is torch.bfloat16
    # fp32's own error may fall on either side of a rounding boundary, in a few of 660 elements
    assert (got != wanted.bfloat16()).float().mean() < 5e-3


def test_the_gated_norm_is_over_each_group_of_channels():
    x, z, gamma = tensors((3, 2, 12), (3, 2, 12), (12,))
    made = GatedNorm(12, eps=1e-3, group_size=4, dtype=torch.float64)
    assert made.weight.tolist() == [1.0] * 12
    assert made.weight.tensor_model_parallel  # else the norm of gradients counts one rank's shard alone
    with torch.no_grad():
        made.weight.copy_(gamma)
    gated = x * F.silu(z)
    groups = gated.unflatten(-1, (3, 4))
    wanted = (groups / (groups.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * gamma
    assert torch.allclose(made(x, z), wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(made(gated), wanted, rtol=1e-12, atol=1e-12)


def test_samples_of_a_packed_row_do_not_see_each_other():
    """Neither the convolution nor the states pass from one to the next; gradients neither."""
    projected, *others = fused_inputs()
    row, options = projected[:1], {"chunk_size": 4, "headdim": None, "ngroups": GROUPS}
    places = torch.tensor([[0, 0, 0, 2, 2, 2, 2, 2, 2, 3, 3]], dtype=torch.int32)
    packed = with_gradients(lambda *given: [convolve_and_scan(*given, **options, seq_idx=places)], [row, *others])

    def alone(row, *others):
        parts = [slice(3), slice(3, 9), slice(9, 11)]
        return [torch.cat([convolve_and_scan(row[:, at], *others, **options) for at in parts], 1)]

    for mine, theirs in zip(packed, with_gradients(alone, [row, *others]), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.allclose(packed[0], convolve_and_scan(row, *others, **options))


def test_what_needs_the_kernels_is_refused():
    packed = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    given = fused_inputs()
    for options, word in (({"activation": "relu"}, "relu"), ({"seq_idx": packed}, "packed")):
        with pytest.raises(InputError, match=word):
            convolve_and_scan(*given, 4, **options)
    with pytest.raises(InputError, match="packed"):
        scan(*inputs()[:5], 4, seq_idx=packed)
    with pytest.raises(InputError, match="norm_before_gate"):
        GatedNorm(4, norm_before_gate=True)


# -- Megatron's mixer --------------------------------------------------------------------------------------
@pytest.mark.usefixtures("one_process")
def test_megatrons_two_paths_through_its_mixer_agree():
    """One calls the fused step and norms what is gated; the other convolves, scans and gates in the norm."""
    fused, plain = (
        bare_models.build("hybrid", use_mamba_mem_eff_path=path)[0].decoder.layers[0] for path in (True, False)
    )
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(20, 3, 48, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(fused(x), plain(x), atol=SCAN_FP32)


@pytest.mark.usefixtures("one_process")
def test_megatrons_mixer_has_the_kernels_parameters():
    assert mixer.HAVE_MAMBA_SSM
    layer = bare_models.build("hybrid")[0].decoder.layers[0].mixer
    names = {name.replace("conv1d_", "conv1d.") for name, _ in layer.named_parameters()}  # Megatron-core 0.19's names
    assert names == {
        "A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "norm.weight", "in_proj.layer_norm_weight",
        "in_proj.weight", "out_proj.weight",
    }  # fmt: skip
