"""A Mamba hybrid in rotated coordinates of its residual stream is the same model."""

import numpy as np
import pytest
from pico import pico_nemotron_h
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.commands.rotate import write_rotated
from nemo_minitron.pruning.rotation import rotation_of
from nemo_minitron.sources.folder import HFSource
from nemo_minitron.sources.tensors import whole

pytestmark = pytest.mark.bridge  # transformers 5 alone has the model


def test_it_has_the_same_logits(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    source = HFSource(pico_nemotron_h(tmp_path / "teacher"))
    size, tokens = source.architecture.hidden_size, np.random.default_rng(3).integers(0, 509, (2, 24))
    x = np.random.default_rng(0).normal(size=(3 * size, size)) * np.geomspace(3, 0.1, size)
    write_rotated(source, rotation_of(source, x.T @ x), tmp_path / "rotated", {})
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, chunk_size=32)(torch.from_numpy(tokens)).logits
            for name in ("rotated", "teacher")
        )
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < LOGITS_PICO_FP32
    for name in ("layers.0.x.weight", "layers.0.out.weight"):
        index = whole(source.architecture.shapes()[name])
        assert (HFSource(tmp_path / "rotated").read(name, index) != source.read(name, index)).mean() > 0.9
