"""What only a GPU can show: `make test-gpu`. Skipped, with the reason, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico import pico_llama
from tolerances import FP8_KL, KL_FP32

import nemo_minitron.backend as backend
from nemo_minitron.precisions import FP8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: run it with make test-gpu on one")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip


def test_the_kl_runs_in_triton_and_is_right():
    from nemo_minitron.distillation.losses import _triton, forward_kl

    student, teacher = (torch.randn(7, 1, 5003, device="cuda").mul_(4) for _ in "st")
    assert _triton.usable(student)
    wanted = torch.nn.functional.kl_div(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    got = forward_kl(student, teacher).double()
    assert ((got - wanted).abs() / (1 + wanted)).max() < KL_FP32


def test_fp8_is_rounded_as_on_a_cpu():
    from nemo_minitron.backend import fp8

    x = torch.randn(300, 500) * torch.exp2(torch.randn(300, 500) * 4)
    for dtype in (fp8.E4M3, fp8.E5M2):
        scale = fp8.scale_of(x.abs().max(), dtype)
        assert torch.equal(fp8.rounded(x.cuda(), scale.cuda(), dtype).cpu(), fp8.rounded(x, scale, dtype))
    assert torch.equal(fp8.rounded_blocks(x.cuda(), 1, 128).cpu(), fp8.rounded_blocks(x, 1, 128))


@pytest.mark.parametrize("precision", ["bf16", *FP8])
def test_a_model_and_its_scores(precision, tmp_path):
    """Transformer Engine's layers where they are, else the reference layers, against the same model in fp32 from
    transformers. FP8 that this device cannot do is refused."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.backend.precision import legal_here
    from nemo_minitron.importance import estimate
    from nemo_minitron.nemo.models import load_model

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
    scores = estimate([model], list(tokens.cuda().split(1)))
    assert scores["ffn"].shape == (6, 192)


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
