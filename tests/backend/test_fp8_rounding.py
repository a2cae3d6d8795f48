"""The FP8 emulation against float64: every value of a format from its bits, scales and blocks by hand.

Tried by hand, each of these makes a test fail: the clamp left out (5e5 becomes infinity in E5M2), E4M3 for
gradients, a scale rounded up to a power of two, blocks along the wrong dimension for the weights' gradient, a
history that forgets one pass too early, the output head in FP8.
"""

import math

import bare_models
import pytest
import torch
from tolerances import FP8_PRODUCT

from nemo_minitron.backend import fp8
from nemo_minitron.backend.precision import EMULATED

FORMATS = [pytest.param(4, 3, 7, 448.0, fp8.E4M3, id="e4m3"), pytest.param(5, 2, 15, 57344.0, fp8.E5M2, id="e5m2")]


def values(exponents, mantissa, bias, most):
    """All finite magnitudes of a format in order, float64: the place of one is its code."""
    found = []
    for code in range(1 << (exponents + mantissa)):
        e, m = code >> mantissa, code & ((1 << mantissa) - 1)
        found.append(m * 2.0 ** (1 - bias - mantissa) if e == 0 else (1 + m / 2**mantissa) * 2.0 ** (e - bias))
    return torch.tensor([v for v in found if v <= most], dtype=torch.float64)


def nearest(x, table):
    """float64: the nearest value of the table, ties to the even code, what is larger to the largest."""
    magnitude = x.double().abs().clamp(max=table[-1])
    above = torch.searchsorted(table, magnitude).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - magnitude, magnitude - table[below]
    chosen = torch.where(up < down, above, below)
    chosen = torch.where(up == down, torch.where(above % 2 == 0, above, below), chosen)
    return table[chosen] * x.double().sign()


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("exponents", "mantissa", "bias", "most", "dtype"), FORMATS)
def test_values_are_rounded_as_the_format_has_them(exponents, mantissa, bias, most, dtype):
    table = values(exponents, mantissa, bias, most)
    ties = ((table[1:] + table[:-1]) / 2).float()
    wide = torch.exp2(random(20_000, scale=8.0)) * random(20_000, seed=1).sign()
    x = torch.cat([table.float(), ties, -ties, wide, torch.tensor([0.0, 5e5, -5e5, torch.inf, -torch.inf])])
    got = fp8.quantize(x, torch.tensor(1.0), dtype)
    assert torch.equal(got.double(), nearest(x, table))
    inside = x.abs() <= most
    assert torch.equal(got[inside].float(), x[inside].to(dtype).float())  # torch's own cast
    assert got.float().isfinite().all()
    assert fp8.quantize(torch.tensor([torch.nan]), torch.tensor(1.0), dtype).float().isnan()


def test_scales():
    amax = torch.tensor([2.0, 0.0, torch.inf, 1e-45, 3.0])
    wanted = torch.tensor([224.0, 1.0, 1.0, torch.finfo(torch.float32).max, 448 / 3])
    assert torch.equal(fp8.scale_of(amax, fp8.E4M3), wanted)
    powers = fp8.scale_of(amax, fp8.E4M3, power_of_two=True).tolist()
    assert powers == [128.0, 1.0, 1.0, 2.0**127, 128.0]
    assert fp8.scale_of(torch.tensor(3.5), fp8.E4M3, power_of_two=True) == 128  # exact powers stay
    assert fp8.scale_of(torch.tensor(0.0), fp8.E5M2, otherwise=torch.tensor(7.0)) == 7


def test_blocks_have_their_own_power_of_two():
    x = random(130, 300) * torch.exp2(random(130, 300, seed=2, scale=4.0))
    x[:, 256:] = 0.0
    table = values(4, 3, 7, 448.0)
    for rows, columns in ((1, 128), (128, 1), (128, 128)):
        wanted = torch.zeros(130, 300, dtype=torch.float64)
        for top in range(0, 130, rows):
            for left in range(0, 300, columns):
                block = x[top : top + rows, left : left + columns].double()
                most = float(block.abs().max())
                scale = 2.0 ** math.floor(math.log2(448.0 / most)) if most else 1
                wanted[top : top + rows, left : left + columns] = nearest(block * scale, table) / scale
        assert torch.equal(fp8.rounded_blocks(x, rows, columns).double(), wanted)


def tensorwise(x, dtype):
    exponents, mantissa, bias, most = (4, 3, 7, 448.0) if dtype is fp8.E4M3 else (5, 2, 15, 57344.0)
    scale = (torch.tensor(most) / x.abs().max().float()).double()
    return nearest((x.float() * scale.float()), values(exponents, mantissa, bias, most)) / scale


@pytest.mark.parametrize("recipe", ["current", "blocks"])
def test_a_linear_layer_multiplies_rounded_operands(recipe):
    """y = Q(x) Q(w)^T, dx = Q(g) Q(w), dw = Q(g)^T Q(x), each Q as that product wants it; products in float64."""
    uneven = torch.exp2(random(160, seed=3, scale=6.0))  # powers of two alone round alike but for the smallest values
    x, w = (random(2, 70, 160) * uneven).requires_grad_(), random(96, 160, seed=1).requires_grad_()
    g = random(2, 70, 96, seed=2)
    y = fp8.linear(x, w, fp8.Current() if recipe == "current" else fp8.Blocks())
    y.backward(g * 1e-4)
    flat, gradient = x.detach().flatten(0, 1), (g * 1e-4).flatten(0, 1)
    if recipe == "current":
        x_y = x_w = tensorwise(flat, fp8.E4M3)
        q_w, g_x = tensorwise(w.detach(), fp8.E4M3), tensorwise(gradient, fp8.E5M2)
        g_w = g_x
    else:
        x_y, x_w = fp8.rounded_blocks(flat, 1, 128).double(), fp8.rounded_blocks(flat, 128, 1).double()
        q_w = fp8.rounded_blocks(w.detach(), 128, 128).double()
        g_x, g_w = fp8.rounded_blocks(gradient, 1, 128).double(), fp8.rounded_blocks(gradient, 128, 1).double()
    for got, wanted in ((y, x_y @ q_w.t()), (x.grad, g_x @ q_w), (w.grad, g_w.t() @ x_w)):
        got, wanted = got.flatten(0, -2), wanted.flatten(0, -2)
        assert ((got.double() - wanted).abs() <= FP8_PRODUCT * wanted.abs().amax(0)).all()
    assert (y - x @ w.t()).abs().max() > 1e-2  # it did round


def test_delayed_scales_follow_the_passes_before():
    """The largest of the last three passes decides the next one's scale; the first takes its own."""
    scaling, seen = fp8.Delayed(length=3), []
    for number, size in enumerate([4.0, 2.0, 1.0, 0.5, 0.0, 8.0, 1.0]):
        x = random(16, 16, seed=number)
        x = x / x.abs().max() * size
        scale = 448.0 / (max(seen[-3:]) if seen else size)
        got, _ = scaling.cast(x, "input", False)
        wanted = nearest(x * torch.tensor(scale), values(4, 3, 7, 448.0)) / scale
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0.0)
        seen.append(size)
    assert got.abs().max() == 1.0
    assert scaling.cast(torch.full((4, 4), 100.0), "input", False)[0].max() == 8.0  # clamped to what was seen


def test_a_bare_model_in_fp8(one_process):
    """The layers' linears, and nothing else: output head, embedding, norms and attention stay as they are."""
    tokens = bare_models.tokens(2)
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    losses = {}
    for recipe in (None, "delayed", "tensorwise", "blockwise"):
        config = bare_models.config("llama")
        if recipe:
            setattr(config, EMULATED, recipe)
        torch.manual_seed(5)
        model = bare_models._chunk(config, False, None)
        linears = {name for name, module in model.named_modules() if getattr(module, "fp8", None) is not None}
        layers = {f"decoder.layers.{i}." for i in range(4)}
        ends = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        assert linears == ({layer + end for layer in layers for end in ends} if recipe else set())
        loss = model(tokens, positions, None, labels=tokens).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        losses[recipe] = float(loss)
    assert len(set(losses.values())) == 4  # three recipes, three roundings
    assert max(abs(loss - losses[None]) for loss in losses.values()) < 0.05


def test_bf16_in_bf16_out():
    x, w = random(4, 32).bfloat16(), random(16, 32, seed=1).bfloat16().requires_grad_()
    y = fp8.linear(x, w, fp8.Delayed())
    y.sum().backward()
    assert y.dtype is w.grad.dtype is torch.bfloat16
    for scaling in (fp8.Current(), fp8.Blocks(), fp8.Delayed()):  # an expert without tokens
        empty = fp8.linear(x[:0], w, scaling)
        empty.sum().backward()
        assert empty.shape == (0, 16)
