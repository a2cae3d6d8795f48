"""A student that was distilled on a GPU with Transformer Engine: in NeMo alone, where nothing of this package is
imported; and where there is no GPU."""

import json

import numpy as np
import pytest
import torch
from command_line import compressed, exported_as_is, minitron, moved, plain
from tolerances import LOSS_LAYOUT_FP32

from nemo_minitron.families import from_hf
from nemo_minitron.search import random_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: run it with make test-gpu on one")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
FP8 = [
    "keep.ffn=64", "calibration.precision=fp8-current", "calibration.sequence_length=32",
    "distillation.precision=fp8-delayed", "distillation.teacher_precision=fp8-current",
    "distillation.sequence_length=32", "distillation.tokens=384",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("transformer_engine")
    return compressed(tmp_path_factory.mktemp("gpu"), **SIZES)


def test_nemo_alone_exports_and_trains_a_student(world):
    """As tests/cli/test_compress.py on a CPU, whose bound on two steps of Adam this is."""
    assert plain(world, "gpu") == []
    assert exported_as_is(world)
    assert {name: by for name, by in moved(world).items() if not 0 < by < 1e-3} == {}


def test_a_checkpoint_of_fp8_training_is_read_without_a_gpu_and_back(world, monkeypatch):
    """Trained in FP8; read and written on a CPU, by a plan that keeps everything; and that is read on the GPU."""
    minitron(world, "compress", "recipe.py", "--out", "fp8", *FP8)
    training, student = world / "fp8" / "checkpoints" / "distilled", world / "fp8" / "student"
    checkpoint = training / json.loads((training / "last.json").read_text())["checkpoint"]
    random_plan(from_hf(student), keep={"ffn": 64}).save(world / "whole.json")
    losses = [loss(world, student)]
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        losses.append(loss(world, checkpoint))
        minitron(world, "prune", checkpoint, "whole.json", "back")
    losses.append(loss(world, "back"))
    np.testing.assert_allclose(losses, losses[0], rtol=LOSS_LAYOUT_FP32)


def loss(world, model):
    said = minitron(world, "evaluate", model, "--data", "corpus.jsonl", "--precision", "fp32", "--json")
    return json.loads(said[said.index("{") : said.rindex("}") + 1])["loss"]
