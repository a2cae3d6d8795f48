"""The callback Pruning on a live model in several processes: one process's plan, and the bits of the cut by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama
from ranks import run_ranks
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.data import build, load_tokenizer
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.sources.open import open_source
from nemo_minitron.sources.tensors import whole

pytestmark = [pytest.mark.slow, pytest.mark.nemo]
WORKER = Path(__file__).parent / "pruning_worker.py"
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(60)]
KEEP = {"ffn": 66, "layers": 5, "hidden": 40, "heads": 6}  # five layers are an uneven pipeline
LAYOUTS = {"one": (1, {}), "tp": (2, {"tp": 2, "sp": True}), "pp": (2, {"pp": 2})}  # TP pads the vocabulary of 509


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Layout -> the plan that was made of the live model in it, whose student was compared."""
    folder, found = tmp_path_factory.mktemp("live"), {}
    teacher = pico_llama(folder / "teacher", hidden_size=48, num_attention_heads=8, num_key_value_heads=2)
    save_tokenizer(teacher, TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    build(folder / "corpus.jsonl", load_tokenizer(teacher), folder / "corpus")
    for name, (world, layout) in LAYOUTS.items():
        out = folder / name
        run_ranks(world, WORKER, teacher, folder / "corpus", out, json.dumps(KEEP), json.dumps(layout))
        found[name] = plan = PrunePlan.load(out / "plan.json")
        expected, cut = HFSource(prune(teacher, plan, folder / f"{name}-by-hand")), open_source(out / "student")
        for tensor, shape in expected.architecture.shapes().items():
            assert np.array_equal(expected.read(tensor, whole(shape)), cut.read(tensor, whole(shape))), tensor
    return found


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_live_model_is_cut_as_in_one_process(layout, plans):
    assert plans[layout].keep == plans["one"].keep
