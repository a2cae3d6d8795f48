"""What only a GPU can show: `make test-gpu`. Skipped, with the reason, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import pico_llama
from tolerances import BF16_SCORES, FP8_KL, FP8_SCORES, FUSED_BF16, KL_FP32, KL_GRADIENT_FP32

import nemo_minitron.backend as backend
from nemo_minitron.artifacts import Scores
from nemo_minitron.precisions import FP8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: run it with make test-gpu on one")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip


ON_A_CPU = """
import sys, torch
from nemo_minitron.importance import estimate
from nemo_minitron.hosts.nemo.models import load_model
folder, tokens, out = sys.argv[1:]
model = load_model(folder, precision="fp32")[0].eval()
assert not torch.cuda.is_available()
estimate([model], list(torch.load(tokens).split(1))).save(out)
"""


def exact(student, teacher):
    """[...], float64, by torch."""
    student, teacher = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def test_the_kl_runs_in_triton_and_is_right():
    from nemo_minitron.distillation.losses import _triton, forward_kl

    student, teacher = (torch.randn(7, 1, 5003, device="cuda").mul_(4) for _ in "st")
    weights = torch.arange(7, device="cuda")[:, None]
    leaf, double = student.clone().requires_grad_(), student.double().requires_grad_()
    assert _triton.usable(leaf)
    got, wanted = forward_kl(leaf, teacher), exact(double, teacher)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert ((got.double() - wanted).abs() / (1 + wanted)).max() < KL_FP32
    assert (leaf.grad - double.grad).abs().max() < 7 * KL_GRADIENT_FP32


@pytest.mark.parametrize("promised", [None, 2.0])
def test_the_fused_head_in_bf16(promised):
    """5,000 tokens, so that there are several chunks; both gradients and, where its factor is known, main_grad."""
    from nemo_minitron.distillation.fused_head import fused_forward_kl

    hidden, theirs = (torch.randn(5000, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in "st")
    heads = [torch.randn(1003, 64, device="cuda", dtype=torch.bfloat16).mul_(0.3) for _ in "st"]
    leaves = [leaf.clone().requires_grad_() for leaf in (hidden, heads[0])]
    leaves[1].main_grad = torch.zeros(1003, 64, device="cuda")
    loss = fused_forward_kl(*leaves, theirs, heads[1], main_grad_scale=promised)
    (2.0 * loss).sum().backward()
    exactly = [leaf.double().requires_grad_() for leaf in (hidden, heads[0])]
    wanted = exact(exactly[0] @ exactly[1].t(), theirs.double() @ heads[1].double().t())
    (2.0 * wanted).sum().backward()
    found = [leaves[0].grad, leaves[1].grad if promised is None else leaves[1].main_grad]
    assert ((loss.double() - wanted).abs() / (1 + wanted)).max() < FUSED_BF16
    for got, leaf in zip(found, exactly, strict=True):
        assert (got.double() - leaf.grad).abs().max() < FUSED_BF16 * leaf.grad.abs().max()


def test_fp8_is_rounded_as_on_a_cpu():
    from nemo_minitron.backend import fp8

    x = torch.randn(300, 500) * torch.exp2(torch.randn(300, 500) * 4)
    for dtype in (fp8.E4M3, fp8.E5M2):
        scale = fp8.scale_of(x.abs().max(), dtype)
        assert torch.equal(fp8.rounded(x.cuda(), scale.cuda(), dtype).cpu(), fp8.rounded(x, scale, dtype))
    assert torch.equal(fp8.rounded_blocks(x.cuda(), 1, 128).cpu(), fp8.rounded_blocks(x, 1, 128))


@pytest.mark.parametrize("precision", ["bf16", *FP8])
def test_a_model_and_its_scores(precision, tmp_path):
    """Transformer Engine's layers where they are, else the reference layers, against the same model in fp32: logits of
    transformers, scores of the reference layers on a CPU. FP8 that this device cannot do is refused."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.backend.precision import legal_here
    from nemo_minitron.hosts.nemo.models import load_model
    from nemo_minitron.importance import estimate

    engine = not backend.setup().reference
    if legal_here().get(precision) or (engine and precision == "fp8-delayed"):
        pytest.skip(f"{precision}: {legal_here()[precision] or 'its scales move in training alone'}")
    folder = pico_llama(tmp_path / "teacher", **SIZES)
    tokens = torch.randint(509, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        model = load_model(folder, precision=precision)[0].eval()
        got = model(tokens.cuda(), torch.arange(32, device="cuda")[None].expand_as(tokens), None).float().cpu()
    kl = torch.nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True)
    assert kl.sum(-1).mean() < FP8_KL
    scores, bound = estimate([model], list(tokens.cuda().split(1))), FP8_SCORES if precision in FP8 else BF16_SCORES
    exactly = scores_on_a_cpu(folder, tokens, tmp_path)
    for axis in ("ffn", "heads", "hidden", "layers"):
        off = np.abs(scores[axis] - exactly[axis]).max(-1) / exactly[axis].max(-1)
        assert off.max() < bound, axis


def scores_on_a_cpu(folder, tokens, work):
    torch.save(tokens, work / "tokens.pt")
    command = [sys.executable, "-c", ON_A_CPU, str(folder), str(work / "tokens.pt"), str(work / "scores.safetensors")]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return Scores.load(work / "scores.safetensors")


def test_every_part_of_the_benchmark_runs(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, timeout=500, env=os.environ)
    found = json.loads(out.read_text())["found"]
    wrong = {name: part["error"] for name, part in found.items() if isinstance(part, dict) and "error" in part}
    assert {name for name in wrong if "Liger" not in name} == set(), wrong
    if found["Transformer Engine"]:  # it is really used
        kernels = [part["FP8 kernels"] for part in found.values() if isinstance(part, dict) and "FP8 kernels" in part]
        assert kernels
        assert all(names and not names[0].startswith("not profiled") for names in kernels), kernels
