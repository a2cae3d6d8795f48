"""The fused output head: agreement with the loss of whole logits, refusals, memory. Shards: test_loss_shards.py."""

import pytest
import torch
from tolerances import FUSED_BF16, FUSED_FP32

from nemo_minitron.distillation import fused_head
from nemo_minitron.distillation.fused_head import fused_forward_kl
from nemo_minitron.distillation.losses import forward_kl


def check_fused(case, world):
    """A case of losses64.FUSED, on one rank."""
    allowed = FUSED_BF16 if case["dtype"] == "bfloat16" else FUSED_FP32 * max(1, case["temperature"] ** 2)
    for what in ("value", "hidden", "weight", "main_grad"):
        assert case[what] < allowed, (what, case)
    assert case["padding"] == 0, case
    _, extra_s, extra_t = case["layout"]
    chunks = -(-case["tokens"] // 3)  # the worker's chunks hold three tokens
    gathers = case["sp"] * (1 if case["given"] else 2)
    expected = [chunks + gathers + (extra_s != extra_t), 1]
    assert case["collectives"] == (expected if world > 1 else [0, 0]), case


def inputs(dtype=torch.float32, tokens=(6, 2), vocab=131):
    generator = torch.Generator().manual_seed(3)
    shapes = ((*tokens, 16), (vocab, 16), (*tokens, 24), (vocab, 24))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_equals_the_unfused_loss(chunk, monkeypatch):
    monkeypatch.setitem(fused_head.CHUNK, "cpu", chunk)
    hidden, weight, t_hidden, t_weight = inputs()
    found = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss = fused_forward_kl(h, w, t_hidden, t_weight, temperature=2.0)
        else:
            loss = forward_kl(h @ w.t(), t_hidden @ t_weight.t(), 2.0)
        (loss.mean() * 3).backward()
        found.append((loss, h.grad, w.grad))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 4 * FUSED_FP32 * (1 + other.abs().max())


def test_frozen_hidden_or_head_and_no_gradient_at_all():
    hidden, weight, t_hidden, t_weight = inputs()
    head = weight.clone().requires_grad_()
    fused_forward_kl(hidden, head, t_hidden, t_weight).sum().backward()
    assert head.grad is not None
    with torch.no_grad():
        assert not fused_forward_kl(hidden, head, t_hidden, t_weight).requires_grad
    states = hidden.clone().requires_grad_()
    fused_forward_kl(states, weight, t_hidden, t_weight).sum().backward()
    assert states.grad is not None


def test_ignored_tokens_are_not_looked_at():
    hidden, weight, t_hidden, t_weight = inputs()
    mask = torch.ones(6, 2)
    mask[2:4] = 0
    hidden[2:4], t_hidden[2:4] = torch.nan, torch.nan
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = fused_forward_kl(h, w, t_hidden, t_weight, loss_mask=mask)
    (loss * mask).sum().backward()
    assert (loss[2:4] == 0).all()
    assert (h.grad[2:4] == 0).all()
    assert torch.isfinite(w.grad).all()
    loss = fused_forward_kl(h, w, t_hidden, t_weight, loss_mask=torch.zeros(6, 2))
    loss.sum().backward()
    assert (loss == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
@pytest.mark.parametrize("promised", [None, 2.5])
def test_no_tokens(shape, promised):
    """Not even a masked one, as of a rank whose rows ran out: no loss, and gradients of 0."""
    hidden, weight = torch.randn(*shape, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    weight.main_grad = torch.zeros(17, 8)
    for mask in (None, torch.zeros(shape)):
        hidden.grad = weight.grad = None
        loss = fused_forward_kl(
            hidden, weight, torch.randn(*shape, 8), torch.randn(17, 8), loss_mask=mask, main_grad_scale=promised
        )
        loss.sum().backward()
        assert loss.shape == shape
        assert hidden.grad.shape == hidden.shape
        assert not weight.main_grad.any()
        assert promised or not weight.grad.any()


def test_a_promised_factor_that_does_not_come_is_refused():
    hidden, weight, t_hidden, t_weight = inputs()
    head = weight.requires_grad_()
    head.main_grad = torch.zeros(head.shape)
    loss = fused_forward_kl(hidden, head, t_hidden, t_weight, main_grad_scale=1.0)
    with pytest.raises(RuntimeError, match="is not 1 times loss_mask"):
        (loss * 2).sum().backward()
    none = torch.zeros(6, 2)  # no token counts: nothing to multiply
    fused_forward_kl(hidden, head, t_hidden, t_weight, loss_mask=none, main_grad_scale=1.0).sum().backward()


def test_refuses_a_gradient_that_is_no_multiple_of_the_mask():
    hidden, weight, t_hidden, t_weight = inputs()
    loss = fused_forward_kl(hidden, weight.requires_grad_(), t_hidden, t_weight)
    with pytest.raises(RuntimeError, match="no multiple of loss_mask"):
        (loss * torch.rand(6, 2, generator=torch.Generator().manual_seed(0))).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "must be positive"),
        ({"teacher_weight": None}, "either teacher_logits or"),
        ({"teacher_logits": torch.zeros(6, 2, 131)}, "either teacher_logits or"),
        ({"teacher_weight": torch.zeros(140, 24)}, "give the true vocab_size"),
        ({"vocab_size": 132}, "do not hold a vocabulary of 132"),
        ({"main_grad_scale": 1.0}, "needs a weight with an fp32 main_grad"),
    ],
)
def test_refusals(change, message):
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    with pytest.raises(ValueError, match=message):
        fused_forward_kl(**(dict(zip(names, inputs(), strict=True)) | change))


def test_no_tensor_as_large_as_all_logits(monkeypatch):
    """Every tensor that torch makes inside is counted. A whole [N, V] made anywhere fails this."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if torch.is_tensor(tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    monkeypatch.setitem(fused_head.CHUNK, "cpu", 4)
    hidden, weight, t_hidden, t_weight = inputs(tokens=(64, 2), vocab=1024)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        fused_forward_kl(h, w, t_hidden, t_weight).sum().backward()
    assert largest.numbers <= 1024 * 24  # the teacher's head itself
    with Largest() as largest:
        forward_kl(h @ w.t(), t_hidden @ t_weight.t()).sum().backward()
    assert largest.numbers >= 128 * 1024  # it does see them
