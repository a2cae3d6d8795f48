"""The matrix in front of dropped layers learns to write what they wrote: by hand in float64, in every layout.

Mutations tried by hand, each of which makes tests here fail: the stream behind the gap not sent to the stage of the
matrix; a token's weight left out; under sequence parallelism the rank's own positions alone; a row that fills up the
schedule counted.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TEXTS
from pico import pico_llama
from ranks import run_ranks
from tolerances import FILLED
from words import save_tokenizer

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.typed import plain
from nemo_minitron.data import Tokens, build, load_tokenizer
from nemo_minitron.families import from_hf
from nemo_minitron.pruning.defaults import GAP_RIDGE
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import CompensateOrder

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "compensate_worker.py"
ROWS = {"samples": 5, "sequence_length": 36, "batch_size": 2, "precision": "fp32", "seed": 7}  # the last batch has one
HIDDEN, NEURONS = [i for i in range(48) if i % 7 != 3], 60
# (what stays, {first dropped layer: the layer behind the gap}); of six layers the stages of pp=2 have three each
PLANS = {"across": ([0, 1, 5], [(2, 5)]), "two gaps and the end": ([1, 3], [(0, 1), (2, 3), (4, 6)])}
LAYOUTS = {
    "one": Layout(), "dp": Layout(dp=2), "tp": Layout(tp=2), "tp-sp": Layout(tp=2, sp=True), "cp": Layout(cp=2),
    "pp": Layout(pp=2), "pp-vp": Layout(pp=2, vp=3),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    teacher = pico_llama(models / "teacher", num_attention_heads=8, num_key_value_heads=4)
    save_tokenizer(teacher, TEXTS, 509)
    source = from_hf(teacher)
    for name, (layers, _) in PLANS.items():
        neurons = {layer: sorted((7 * i + layer) % 96 for i in range(NEURONS)) for layer in layers}
        target = source.keep_layers(layers).replace(hidden_size=len(HIDDEN), ffn_hidden_size=NEURONS)
        PrunePlan(source, target, {"layers": layers, "hidden": HIDDEN, "ffn": neurons}).save(models / f"{name}.json")
    (models / "corpus.txt").write_text("\n".join(TEXTS))
    build(models / "corpus.txt", load_tokenizer(teacher), models / "corpus")
    return models


def solved(folder, layout, fill):
    """Plan -> its Compensation, all of one run."""
    plans = {folder / f"{name}.json": folder / f"{name} {layout} {fill}" for name in PLANS}
    order = CompensateOrder(
        folder / "teacher", plans, folder / "corpus", 0.01, 10**9, Calibration(**ROWS), layout, fill_gaps=fill
    )
    write_json(folder / "order.json", plain(order))
    run_ranks(layout.processes, WORKER, folder / "order.json")
    return {plan.stem: Compensation.load(out) for plan, out in plans.items()}


@pytest.fixture(scope="module")
def plainly(folder):
    """The least squares of the neurons alone."""
    return solved(folder, Layout(), False)


@pytest.fixture(scope="module")
def seen(folder):
    """(the stream in front of each layer and behind the last, what each `down` reads), flat, of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    rows, read = Tokens(folder / "corpus").windows(36, 5, 7), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    last = []
    model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        streams = model.model(rows, output_hidden_states=True).hidden_states[:-1]
    return [x.flatten(0, 1).numpy() for x in (*streams, *last)], [x.flatten(0, 1).numpy() for x in read]


def log_length(x):
    return np.log(np.linalg.norm(x, axis=1)).mean()


def change(seen, plan, first, behind):
    """(The change of the `down` of layer first - 1, log a.)"""
    streams, reads = seen
    x, y = streams[first], streams[behind]
    growth = log_length(y) - log_length(x)
    if not first:
        return None, growth
    h, weight = reads[first - 1][:, plan.keep["ffn"][first - 1]], 1 / (y**2).sum(1, keepdims=True)
    aim = (y / np.exp(growth) - x)[:, HIDDEN]
    gram = (h * weight).T @ h
    gram += GAP_RIDGE * np.diag(gram).mean() * np.eye(len(gram))
    return np.linalg.solve(gram, (h * weight).T @ aim).T, growth


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_equals_float64(folder, plainly, seen, layout):
    for name, found in solved(folder, layout, True).items():
        plan, (layers, gaps) = PrunePlan.load(folder / f"{name}.json"), PLANS[name]
        assert found.tensors.keys() == plainly[name].tensors.keys()
        made = {first: change(seen, plan, first, behind) for first, behind in gaps}
        for number, layer in enumerate(layers):
            tensor = f"layers.{number}.down.weight"
            more, _ = made.get(layer + 1, (None, 0.0))
            expected = plainly[name].tensors[tensor] + (0 if more is None else more)
            assert more is None or np.abs(more).max() > 100 * FILLED
            np.testing.assert_allclose(found.tensors[tensor], expected, rtol=0, atol=FILLED)
            factor = np.exp(-sum(made[first][1] for first, behind in gaps if behind <= layer))
            for local in ("o.weight", "down.weight"):
                assert found.scales.get(f"layers.{number}.{local}", 1.0) == pytest.approx(factor, rel=1e-5)
        filled = sorted(f"layers.{layers.index(first - 1)}.down.weight" for first, _ in gaps if first)
        assert found.notes["filled gaps"] == filled
