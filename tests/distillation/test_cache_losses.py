"""Losses against a cache's few tokens: the float64 reference in value and gradient, and its expectation.

Mutations tried by hand, each of which makes tests here fail: 1 in the place of the weights' sum before the student's
probabilities (the reference); weights divided by their sum (the expectation at a proposal temperature); the tail's
mass left out of the gradient outside of K.
"""

import pytest
import torch
from test_cache_sampling import GRID, HEATS, MASSES, midpoints, target
from tolerances import CACHED_KL_FP32, KL_FP32, KL_GRADIENT_FP32, SMALL_LOSS_FP32

from nemo_minitron.distillation.cache import CachedTargets, cached_top_k_kl, draw, sampled_cross_entropy, top
from nemo_minitron.distillation.losses._per_token import CHUNK

SHAPE, V, K = torch.Size([3, 5]), 509, 12


def reference(student, targets, temperature):
    """Value per token and its gradient's graph, in float64, of what the two losses are defined as."""
    log_p = (student / temperature).log_softmax(-1)
    held, weights = targets.ids >= 0, targets.weights.double()
    chosen = log_p.gather(-1, targets.ids.clamp(min=0))
    value = -(weights * chosen * held).sum(-1)
    if targets.tail is not None:
        rest = log_p.exp().scatter(-1, targets.ids, 0).sum(-1)
        tail = targets.tail.double()
        value = value + torch.special.xlogy(weights, weights).sum(-1) + torch.special.xlogy(tail, tail / rest)
    return value * temperature**2


def sampled_targets(seed, shape=SHAPE, vocab=V):
    """Weights that do not sum to 1; the first position has all K tokens, later ones fewer, the last none."""
    generator = torch.Generator().manual_seed(seed)
    count = min(K, vocab)
    ids = torch.rand(*shape, vocab, generator=generator).topk(count).indices
    weights = torch.rand(*shape, count, generator=generator) * 0.3
    number = torch.linspace(count, 0, shape.numel()).long().reshape(shape)
    filled = torch.arange(count) < number[..., None]
    return CachedTargets(ids.where(filled, -1), weights.where(filled, 0.0))


def top_targets(seed, temperature, shape=SHAPE, vocab=V):
    teacher = torch.randn(*shape, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    parts = top(teacher.reshape(-1, vocab), min(K, vocab - 1), temperature)
    ids, p, tail = (part.unflatten(0, shape) for part in parts)
    return CachedTargets(ids, p, tail)


def made(mode, seed, temperature, shape=SHAPE, vocab=V):
    if mode == "sample":
        return sampled_cross_entropy, sampled_targets(seed, shape, vocab)
    return cached_top_k_kl, top_targets(seed, temperature, shape, vocab)


@pytest.mark.parametrize("chunk", [1, 600, 1 << 22])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("mode", ["sample", "top-k"])
def test_value_and_gradient(mode, temperature, chunk, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    loss, targets = made(mode, 1, temperature)
    generator = torch.Generator().manual_seed(0)
    student, weights = torch.randn(*SHAPE, V, generator=generator) * 4, torch.rand(SHAPE, generator=generator)
    mine, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    value = loss(mine, targets, temperature)
    (value * weights).sum().backward()
    expected = reference(theirs, targets, temperature)
    (expected * weights).sum().backward()
    assert (value.dtype, value.shape) == (torch.float32, SHAPE)
    assert ((value - expected).abs() / (1 + expected.abs())).max() < KL_FP32
    assert (mine.grad - theirs.grad).abs().max() < KL_GRADIENT_FP32 * max(1, temperature)
    assert mine.grad.sum(-1).abs().max() < V * KL_GRADIENT_FP32  # a shift of all logits changes nothing


@pytest.mark.parametrize(("temperature", "proposal"), HEATS)
def test_the_expected_gradient_is_that_of_the_full_forward_kl(temperature, proposal):
    """One draw a position, its number at each of 64 midpoints: the mean over positions is the expectation."""
    logits = (MASSES.double().log() * temperature * proposal).float().expand(GRID, -1)
    tokens, ratios = draw(logits, midpoints().T.contiguous(), temperature, proposal)
    targets = CachedTargets(tokens, torch.ones(GRID, 1) if ratios is None else ratios)
    student = torch.randn(len(MASSES), generator=torch.Generator().manual_seed(7))
    one = student.expand(GRID, -1).clone().requires_grad_()
    value = sampled_cross_entropy(one, targets, temperature)
    value.sum().backward()
    full = student.double().requires_grad_()
    p, log_s = target(logits[0], temperature), (full / temperature).log_softmax(-1)
    (temperature**2 * (torch.special.xlogy(p, p) - p * log_s).sum()).backward()
    cross_entropy = -(temperature**2) * (p * log_s).sum()
    assert value.mean().item() == pytest.approx(cross_entropy.item(), rel=KL_FP32)
    assert (one.grad.double().mean(0) - full.grad).abs().max() < KL_GRADIENT_FP32 * max(1, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_is_the_full_kl(temperature):
    """k of the whole vocabulary: no tail, and the loss is the forward KL of the online teacher."""
    from nemo_minitron.distillation.losses import forward_kl

    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(7, V, generator=generator) * 3 for _ in "st")
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    cached = cached_top_k_kl(a, CachedTargets(*top(teacher, V, temperature)), temperature)
    online = forward_kl(b, teacher, temperature)
    cached.sum().backward()
    online.sum().backward()
    assert ((cached - online).abs() / (1 + online)).max() < CACHED_KL_FP32
    assert (a.grad - b.grad).abs().max() < 2 * KL_GRADIENT_FP32 * temperature


def test_an_equal_student_has_no_top_k_loss_and_one_without_a_tail_stays_finite():
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(6)) * 3
    mine = logits.clone().requires_grad_()
    loss = cached_top_k_kl(mine, CachedTargets(*top(logits, K)))
    loss.sum().backward()
    assert loss.abs().max() < KL_FP32
    assert mine.grad.abs().max() < KL_GRADIENT_FP32
    sure = torch.full((1, 4), -1e4).index_fill(1, torch.tensor([2]), 1e4).requires_grad_()
    loss = cached_top_k_kl(sure, CachedTargets(torch.tensor([[2]]), torch.tensor([[0.5]]), torch.tensor([0.5])))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize("mode", ["sample", "top-k"])
def test_padding_takes_no_part_and_the_gradient_may_lie_in_the_logits(mode):
    loss, targets = made(mode, 2, 2.0)
    student = torch.randn(*SHAPE, V, generator=torch.Generator().manual_seed(8))
    padded = torch.cat([student, torch.full((*SHAPE, 3), 1e3)], -1)
    plain, kept, spent = student.clone().requires_grad_(), padded.clone().requires_grad_(), padded.clone()
    values = [loss(plain, targets, 2.0), loss(kept, targets, 2.0, vocab_size=V)]
    values.append(loss(spent.requires_grad_(), targets, 2.0, vocab_size=V, in_place=True))
    for value in values:
        value.sum().backward()
        assert torch.equal(value, values[0])
    assert torch.equal(kept.grad, torch.nn.functional.pad(plain.grad, (0, 3)))
    assert torch.equal(spent.grad, kept.grad)
    assert spent.grad.data_ptr() == spent.data_ptr()


@pytest.mark.parametrize("apart", [0.03, 3.0])
def test_a_small_loss_at_a_high_temperature(apart):
    """As a part of it: T^2 multiplies no rounding."""
    teacher = torch.randn(*SHAPE, V, generator=torch.Generator().manual_seed(11)) * 3
    student = teacher + apart * torch.randn(*SHAPE, V, generator=torch.Generator().manual_seed(12))
    targets = CachedTargets(*(part.unflatten(0, SHAPE) for part in top(teacher.flatten(0, 1), K, 10.0)))
    exact = reference(student.double(), targets, 10.0) + 100 * (1 - targets.weights.double().sum(-1) - targets.tail)
    assert ((cached_top_k_kl(student, targets, 10.0) - exact).abs() / exact).max() < SMALL_LOSS_FP32


def test_a_student_that_excludes_tokens():
    """A kept one makes the loss +inf; any other, and a row of them, are no probability; gradients stay numbers."""
    loss, targets = made("top-k", 4, 1.0)
    kept = targets.ids[0, 0, 0]
    others = torch.tensor([i for i in range(V) if i not in targets.ids[0, 0].tolist()])
    student = torch.randn(*SHAPE, V, generator=torch.Generator().manual_seed(13)) * 3
    for columns, endless in ((kept[None], True), (others[:200], False)):
        mine = student.clone()
        mine[0, 0, columns] = -torch.inf
        mine.requires_grad_()
        value = loss(mine, targets)
        value.sum().backward()
        assert torch.isinf(value[0, 0]).item() == endless
        assert torch.isfinite(value.flatten()[1:]).all()
        assert torch.isfinite(mine.grad).all()
        if not endless:
            exact = reference(mine.detach().double(), targets, 1.0)
            assert ((value - exact).abs() / (1 + exact)).max() < KL_FP32


def test_inputs_are_not_changed_and_sampled_targets_have_no_tail():
    student, targets = torch.randn(*SHAPE, V, requires_grad=True), sampled_targets(3)
    before = student.detach().clone(), targets.ids.clone()
    sampled_cross_entropy(student, targets).sum().backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(targets.ids, before[1])
    for temperature in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"temperature is {temperature}; it must be positive and finite"):
            sampled_cross_entropy(student, targets, temperature)
    with pytest.raises(ValueError, match="have no tail"):
        cached_top_k_kl(student, targets)
