"""Forward KL in one process: chunks, extremes, what is left alone, refusals. Shards: test_loss_shards.py."""

import pytest
import torch
from losses64 import NAMES, reference
from tolerances import KL_FP32, KL_GRADIENT_FP32

from nemo_minitron.distillation import losses
from nemo_minitron.distillation.losses import _per_token, forward_kl


@pytest.mark.parametrize("chunk", [1, 600, 1 << 22])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradient(temperature, chunk, monkeypatch):
    """Whatever the chunk: one row at a time, an odd number, all at once."""
    monkeypatch.setitem(_per_token.CHUNK, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 7, 509, generator=generator).mul(4) for _ in "st")
    weights = torch.rand(2, 7, generator=generator)
    mine = student.clone().requires_grad_()
    loss = forward_kl(mine, teacher, temperature)
    (loss * weights).sum().backward()
    exact = student.double().requires_grad_()
    value = reference("forward_kl", exact, teacher.double(), temperature)
    (value * weights.double()).sum().backward()
    assert loss.dtype == torch.float32
    assert loss.shape == (2, 7)
    assert ((loss.double() - value).abs() / (1 + value)).max() < KL_FP32
    assert (mine.grad.double() - exact.grad).abs().max() < KL_GRADIENT_FP32 * max(1, temperature)


def test_equal_logits_have_no_loss_and_a_shift_changes_nothing():
    logits = torch.randn(5, 101)
    assert forward_kl(logits, logits + 7.0).abs().max() < KL_FP32
    assert forward_kl(logits, logits * 2).min() > 0.01


def test_huge_logits_stay_finite():
    loss = forward_kl(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]]))
    assert loss.item() == pytest.approx(2e4, rel=1e-6)


def test_inputs_are_not_changed_and_teacher_gets_no_gradient():
    student, teacher = torch.randn(3, 17, requires_grad=True), torch.randn(3, 17, requires_grad=True)
    before = student.detach().clone(), teacher.detach().clone()
    forward_kl(student, teacher).sum().backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher.detach(), before[1])
    assert teacher.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    loss, k = getattr(losses, name), (3,) if name == "top_k_kl" else ()
    for teacher, temperature, vocab_size, message in [
        (torch.zeros(2, 4), 1.0, None, "logits are"),
        (torch.zeros(3, 5), 1.0, 4, "logits are"),
        (torch.zeros(2, 5), 0.0, None, "must be positive"),
        (torch.zeros(2, 5), float("inf"), None, "temperature is inf; it must be positive and finite"),
        (torch.zeros(2, 5), float("nan"), None, "temperature is nan"),
        (torch.zeros(2, 5), 1e200, None, "positive and finite"),  # its square is no number
        (torch.zeros(2, 4), 1.0, 5, "do not hold a vocabulary of 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(torch.zeros(2, 5), teacher, *k, temperature, vocab_size=vocab_size)
    for k in (0, 2.5, float("inf")):
        with pytest.raises(ValueError, match=f"k is {k}; it must be a whole number of at least 1"):
            losses.top_k_kl(torch.zeros(2, 5), torch.zeros(2, 5), k)


@pytest.mark.parametrize("name", NAMES)
def test_equal_logits_no_tokens_and_extremes(name):
    """A student that is the teacher has loss and gradient 0; no token is no loss; far logits stay finite."""
    loss, k = getattr(losses, name), (3,) if name == "top_k_kl" else ()
    teacher = torch.randn(4, 33, generator=torch.Generator().manual_seed(1))
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher, *k)
    value.sum().backward()
    assert value.abs().max() < KL_FP32
    assert student.grad.abs().max() < KL_GRADIENT_FP32
    nothing = teacher[:0].clone().requires_grad_()
    assert loss(nothing, teacher[:0], *k).shape == (0,)
    loss(nothing, teacher[:0], *k).sum().backward()
    assert nothing.grad.shape == (0, 33)
    assert torch.isnan(loss(student.detach() * torch.nan, teacher, *k)).all()  # which is never taken for -inf
    far = torch.tensor([[1e4, -1e4, 0.0, 3.0, 5.0]]).requires_grad_()
    value = loss(far, -far.detach(), *k)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(far.grad).all()


def test_in_place_spends_the_logits_and_backward_runs_once():
    head = torch.randn(3, 17, generator=torch.Generator().manual_seed(2)).requires_grad_()
    teacher = torch.randn(3, 17, generator=torch.Generator().manual_seed(3))
    logits = head * 1
    loss = forward_kl(logits, teacher, in_place=True)
    (plain,) = torch.autograd.grad(forward_kl(head, teacher).sum(), head)
    loss.sum().backward(retain_graph=True)
    assert torch.equal(head.grad, plain)
    assert torch.equal(logits.detach(), plain)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
    with torch.no_grad():  # nothing to write then
        kept = head.detach().clone()
        forward_kl(kept.requires_grad_(), teacher, in_place=True)
        assert torch.equal(kept, head)
