"""The data behind the report's figures, and their parts."""

import json
import subprocess
import sys

import numpy as np
import pytest
from run_folder import SOURCE, page, rows, top
from test_architecture import mixed, smollm2

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.export import importance_figures, write_report
from nemo_minitron.export.formatting import change, memory, number, seconds, short_count, size_rows
from nemo_minitron.export.plot import log_ticks
from nemo_minitron.export.result_figures import smoothed


# -- the data behind the figures -------------------------------------------------------------------------
def test_csv_of_the_layers(run, scores):
    write_report(run)
    assert [np.float32(row["block_influence"]) for row in rows(run, "layers")] == scores["layers"].tolist()
    assert [row["kept"] for row in rows(run, "layers")] == ["1"] * 4


def test_csv_of_the_neurons(run, scores):
    write_report(run)
    data = rows(run, "ffn")
    assert len(data) == 4 * importance_figures.COLUMNS
    first_layer = -np.sort(-scores["ffn"][0].astype(np.float64))
    for row in data[: importance_figures.COLUMNS]:
        first, last = int(row["first_rank"]), int(row["last_rank"])
        assert float(row["mean_score"]) == pytest.approx(first_layer[first : last + 1].mean())
        assert int(row["kept"]) == max(0, min(last + 1, 400) - first)
    assert sum(int(row["kept"]) for row in data) == 4 * 400


def test_csv_of_the_hidden_channels(run, scores, width_plan):
    write_report(run)
    data = rows(run, "hidden")
    assert [int(row["channel"]) for row in data] == np.argsort(-scores["hidden"]).tolist()
    assert [np.float32(row["score"]) for row in data] == np.sort(scores["hidden"])[::-1].tolist()
    assert sorted(int(row["channel"]) for row in data if row["kept"] == "1") == width_plan.keep["hidden"]


def test_csv_of_curve_and_numbers(run):
    write_report(run)
    curve = rows(run, "distillation")
    assert [(int(r["step"]), int(r["tokens"]), float(r["loss"])) for r in curve] == [
        (i + 1, (i + 1) * 128, 5 - i / 50) for i in range(100)
    ]
    assert float(curve[50]["smoothed"]) == pytest.approx(5 - 50 / 50)  # a straight line stays what it is
    assert [(r["stage"], float(r["perplexity"])) for r in rows(run, "perplexity")] == [
        ("teacher", 17.25), ("random", 9.7e7), ("pruned", 500.5), ("distilled", 68.0),
    ]  # fmt: skip


def test_what_the_re_fitted_matrices_gained(run):
    """Told where a cut without them was measured, and drawn; nothing is said of a cut that re-fits none."""
    assert "fitted again" not in " ".join(page(run).words)
    numbers = json.loads((run / "numbers.json").read_text())
    sliced = next(row for row in numbers if row["stage"] == "pruned") | {"stage": "sliced", "perplexity": 812.0}
    (run / "numbers.json").write_text(json.dumps([*numbers, sliced]))
    text = " ".join(page(run).words)
    assert "the cut alone has 812.0; matrices fitted again, norms scaled or experts merged" in text
    assert "without any training, make it 500.5" in text
    assert [row["stage"] for row in rows(run, "perplexity")] == ["teacher", "random", "sliced", "pruned", "distilled"]
    assert "pruned, plain slices" in (run / "figures/perplexity.svg").read_text()


def test_heads_and_groups(run, scores):
    heads = {i: [1, 2, 4, 5] for i in range(4)}
    PrunePlan(SOURCE, SOURCE.replace(num_attention_heads=4), {"heads": heads}).save(run / "plan.json")
    write_report(run)
    data = rows(run, "heads")
    assert [np.float32(row["score"]) for row in data] == scores["heads"].ravel().tolist()
    assert [int(row["head"]) for row in data if row["kept"] == "0"] == [0, 3] * 4
    groups = {"heads": {i: [3, 4, 5] for i in range(4)}, "query_groups": {i: [1] for i in range(4)}}
    PrunePlan(SOURCE, SOURCE.replace(num_attention_heads=3, num_query_groups=1), groups).save(run / "plan.json")
    write_report(run)
    assert [int(row["query_group"]) for row in rows(run, "query_groups") if row["kept"] == "1"] == [1] * 4


def test_depth_and_width_together(run, scores):
    keep = {"layers": [0, 1, 3], "ffn": {i: top(-scores["ffn"][i], 400) for i in (0, 1, 3)}}
    PrunePlan(SOURCE, SOURCE.replace(num_layers=3, ffn_hidden_size=400), keep).save(run / "plan.json")
    text = " ".join(page(run).words)
    assert "The plan cuts layer 2." in text
    assert "They are not this score's best: 50 % or more" in text
    assert "layer cut" in (run / "figures/ffn.svg").read_text()
    assert sum(int(row["kept"]) for row in rows(run, "ffn") if row["layer"] == "2") == 0


# -- parts -----------------------------------------------------------------------------------------------
def test_numbers_as_words():
    assert (short_count(134_515_008), short_count(8_030_261_248), short_count(12)) == (
        "134.5 M",
        "8.03 B",
        "12",
    )
    assert (memory(269_030_016), seconds(7384), seconds(4.25)) == ("269.0 MB", "2 h 03 min", "4.2 s")
    assert (change(4, 3), change(4, 4), number(None), number(9.7e7)) == ("−25.0 %", "", "–", "9.70e7")


def test_log_ticks_are_inside_and_enough():
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(0.015, 1.4) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1])
    for low, high in ((1.05, 1.9), (1, 1e12), (1e-9, 3), (0.55, 0.95)):
        ticks = log_ticks(low, high)
        assert 2 <= len(ticks) <= 10
        assert all(low <= tick <= high for tick in ticks)


def test_smoothing_keeps_the_mean_at_the_ends():
    assert smoothed(np.array([1.0, 2.0, 6.0]), 1).tolist() == [1.5, 3.0, 4.0]
    assert smoothed(np.array([1.0, 2.0, 6.0]), 0).tolist() == [1.0, 2.0, 6.0]


def test_importing_the_rooms_loads_nothing_heavy():
    heavy = ("torch", "transformers", "matplotlib", "jinja2", "huggingface_hub", "nemo", "megatron")
    code = "import sys, nemo_minitron.export, nemo_minitron.evaluation\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_sizes_of_a_mixture():
    """A dense model's table has no experts."""
    source = mixed()
    rows = {what: (before, after) for what, before, after, _ in size_rows(source, source.replace(moe_router_topk=1))}
    assert (rows["experts"], rows["experts of a token"]) == (("4", "4"), ("2", "1"))
    assert rows["width of the shared expert"] == ("448", "448")
    at_work = rows["parameters at work on a token"]
    assert at_work == (
        f"{source.parameters(active=True):,}",
        f"{source.replace(moe_router_topk=1).parameters(active=True):,}",
    )
    assert "experts" not in [row[0] for row in size_rows(smollm2(), smollm2())]
