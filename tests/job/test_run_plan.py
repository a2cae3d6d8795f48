"""What a plan from scores alone is refused for."""

import numpy as np
import pytest
from pico import SIZES

from nemo_minitron.artifacts import Scores
from nemo_minitron.commands.plan import run_plan
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.job import Search

MIXED = {"architectures": ["Qwen2ForCausalLM"], **SIZES, "use_sliding_window": True, "sliding_window": 64}


@pytest.mark.parametrize("known", [True, False])
def test_sizes_that_the_models_class_cannot_have(known, tmp_path):
    """Each of six layers has a value of its own under a key that nobody reads: which one goes with a layer?"""
    config = MIXED | {"max_window_layers": 3, "my_scales": [1, 2, 3, 4, 5, 6]}
    notes = {"config": config} if known else {}
    scores = Scores(from_hf(config), {"layers": np.arange(6, dtype=np.float32)}, notes=notes)
    scores.save(tmp_path / "scores.safetensors")
    if not known:  # scores of an older version: the cut itself refuses
        assert run_plan(tmp_path / "scores.safetensors", {"layers": 4}, Search()).plan is not None
        return
    with pytest.raises(InputError, match="my_scales has one value for each of the 6 layers"):
        run_plan(tmp_path / "scores.safetensors", {"layers": 4}, Search())
