"""The second moments of the residual stream: those of transformers in float64, in every layout.

Mutations tried by hand, each of which makes tests here fail: the sums of pipeline stages not added; under sequence
parallelism the tensor-parallel ranks' sums not added; the final norm left out; a row that fills up counted.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TEXTS
from pico import pico_llama, pico_mixtral
from ranks import run_ranks
from tolerances import GRAM_FP32
from words import save_tokenizer

from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.typed import plain
from nemo_minitron.data import Tokens, build, load_tokenizer
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import RotateOrder

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "rotate_worker.py"
ROWS = {"samples": 5, "sequence_length": 36, "batch_size": 2, "precision": "fp32", "seed": 7}  # the last batch has one
LAYOUTS = {
    "one": Layout(), "dp2": Layout(dp=2), "tp2-sp": Layout(tp=2, sp=True), "tp2": Layout(tp=2), "cp2": Layout(cp=2),
    "pp2": Layout(pp=2), "pp2-vp3": Layout(pp=2, vp=3), "ep2": Layout(ep=2, dp=2),
}  # fmt: skip
CASES = [("llama", name) for name in LAYOUTS if name != "ep2"] + [("mixtral", "ep2")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, make in (("llama", pico_llama), ("mixtral", pico_mixtral)):
        make(folder / name, num_attention_heads=8, num_key_value_heads=4)
        save_tokenizer(folder / name, TEXTS, 509)
    (folder / "corpus.txt").write_text("\n".join(TEXTS))
    build(folder / "corpus.txt", load_tokenizer(folder / "llama"), folder / "corpus")
    return folder


def by_the_book(folder, rows):
    """Of transformers' model in float64: the mean over tokens and norms of x x^T, with the trace 48."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if hasattr(model, "set_experts_implementation"):  # transformers 5: its grouped product has no float64
        model.set_experts_implementation("eager")
    sums = torch.zeros(48, 48, dtype=torch.float64)

    def add(module, args):
        x = args[0].flatten(0, -2)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        sums.add_(x.T @ x)

    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    assert len(norms) == 2 * 6 + 1
    for norm in norms:
        norm.register_forward_pre_hook(add)
    with torch.no_grad():
        model(rows)
    return (sums * 48 / sums.trace()).numpy()


@pytest.mark.parametrize(("model", "name"), CASES, ids=[name for _, name in CASES])
def test_it_is_transformers_in_every_layout(models, tmp_path, model, name):
    layout, out = LAYOUTS[name], tmp_path / "covariance.npy"
    order = RotateOrder(models / model, models / "corpus", out, Calibration(**ROWS), layout)
    write_json(tmp_path / "order.json", plain(order))
    run_ranks(layout.processes, WORKER, tmp_path / "order.json")
    found = np.load(out)
    expected = by_the_book(models / model, Tokens(models / "corpus").windows(36, 5, 7))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=GRAM_FP32 * np.abs(expected).max())
    assert [file.name for file in tmp_path.iterdir()] in (["covariance.npy", "order.json"], ["order.json", out.name])
