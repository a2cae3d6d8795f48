"""A size that some version of transformers does not load is not chosen, and is remarked on where it is asked for."""

import numpy as np
import pytest
from pico import pico_llama
from typer.testing import CliRunner

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.cli import app
from nemo_minitron.commands import distill
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, read_config
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.layout import Layout

REMARK = "transformers 5 runs a LlamaForCausalLM only where its hidden_size is a multiple of 6; 40 is not"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of 6 heads and its scores."""
    folder = tmp_path_factory.mktemp("remarks")
    model = pico_llama(folder / "model", num_hidden_layers=2, a_note="unread")
    architecture, generator = from_hf(model), np.random.default_rng(0)
    made = Scores(architecture, {n: generator.random(s, np.float32) for n, s in expected_shapes(architecture).items()})
    made.notes = {"config": read_config(model)}
    made.save(folder / "scores.safetensors")
    return folder


def run(world, monkeypatch, command):
    monkeypatch.chdir(world)
    result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_size_asked_for_by_name_is_remarked_on(world, monkeypatch):
    assert REMARK in run(world, monkeypatch, "plan scores.safetensors --keep hidden=40 --out odd.json")
    pruned = run(world, monkeypatch, "prune model odd.json odd")
    assert f"remark: {REMARK}" in pruned
    assert "remark: keys of the config that neither transformers nor this package reads: a_note" in pruned
    assert f"# remark: {REMARK}" in run(world, monkeypatch, "serving odd --tp 1")


def test_distill_says_how_many_tokens_nobody_asked_for(world, monkeypatch, capsys):
    """Before anything is tokenised. Fails, tried by hand, where the line is left out, and where it is always said."""

    def stop(folder):
        raise InputError("stopped")

    monkeypatch.setattr(distill, "working", stop)
    for settings, words in (
        (Distillation(), "trained on 1,000,000 tokens; --tokens gives another number"),
        (Distillation(tokens=9), ""),  # the folder's name has the word remark, too
    ):
        with pytest.raises(InputError, match="stopped"):
            distill.run_distill(
                str(world / "model"), str(world / "model"), "text.jsonl", world / "out", settings, Layout()
            )
        said = capsys.readouterr().err
        assert (words in said) if words else "gives another number" not in said


def test_a_size_that_loads_everywhere_is_not(world, monkeypatch):
    assert "remark" not in run(world, monkeypatch, "plan scores.safetensors --keep hidden=42 --out even.json")


@pytest.mark.parametrize("given", ["scores.safetensors", "--architecture model", "--architecture model/config.json"])
def test_a_budget_is_met_by_sizes_that_load_everywhere(world, monkeypatch, given):
    monkeypatch.setenv("COLUMNS", "140")
    output = run(world, monkeypatch, f"plan {given} --params 55K --tolerance 20% --out best.json --overwrite --top 50")
    if given == "scores.safetensors":
        assert PrunePlan.load(world / "best.json").target.hidden_size % 6 == 0
    import csv

    with open(world / "best.candidates.csv", newline="") as file:
        hidden = {int(row["hidden"]) for row in csv.DictReader(file)}
    assert len(hidden) > 1
    assert all(size % 6 == 0 for size in hidden)
    assert "remark" not in output
