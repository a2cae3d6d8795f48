"""Forward KL: value and gradient of the unsharded float64 reference, in every sharding and dtype."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import GRADIENT_BF16, KL_FP32, KL_GRADIENT_FP32

from nemo_minitron.distillation.losses import forward_kl

sys.path.insert(0, str(Path(__file__).parent))
from losses_worker import CASES, reference


@pytest.mark.parametrize("chunk", [1, 600, 1 << 22])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradient(temperature, chunk, monkeypatch):
    """Whatever the chunk: one row at a time, an odd number, all at once."""
    monkeypatch.setattr(sys.modules[forward_kl.__module__], "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 7, 509, generator=generator).mul(4) for _ in "st")
    weights = torch.rand(2, 7, generator=generator)
    mine = student.clone().requires_grad_()
    loss = forward_kl(mine, teacher, temperature)
    (loss * weights).sum().backward()
    value, gradient = reference(student, teacher, temperature, weights)
    assert loss.dtype == torch.float32
    assert loss.shape == (2, 7)
    assert ((loss.double() - value).abs() / (1 + value)).max() < KL_FP32
    assert (mine.grad.double() - gradient).abs().max() < KL_GRADIENT_FP32 * max(1, temperature)


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


@pytest.mark.parametrize(("teacher", "temperature"), [(torch.zeros(2, 4), 1.0), (torch.zeros(2, 5), 0.0)])
def test_refusals(teacher, temperature):
    with pytest.raises(ValueError, match=r"logits are|must be positive"):
        forward_kl(torch.zeros(2, 5), teacher, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_shards_equal_the_whole(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    worker = Path(__file__).parent / "losses_worker.py"
    done = subprocess.run([*command, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(world):
        for case, result in zip(CASES, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            _, _, temperature, dtype = case
            bf16 = GRADIENT_BF16 * result["largest"] if dtype == "bfloat16" else 0
            assert result["finite"], case
            assert result["value"] < KL_FP32, case
            assert result["gradient"] < KL_GRADIENT_FP32 * max(1, temperature) + bf16, case
