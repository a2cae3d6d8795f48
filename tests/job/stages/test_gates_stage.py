"""The gates of a job: a right cut passes, a wrong one stops it before anything is trained, and nothing is lost.

The teacher's neurons differ in size, and the text is what it writes itself, so that a cut of the large ones must cost.
"""

import json

import numpy as np
import pytest
from corpora import write_indexed
from pico import pico_llama, raw_tensors, save_tensors

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.errors import GateError
from nemo_minitron.families import from_hf
from nemo_minitron.job import Data, Gates, Job
from nemo_minitron.job.run import Stage, check_recipe, execute, open_run
from nemo_minitron.job.stages import gates as stage
from nemo_minitron.job.stages.compress import stages
from nemo_minitron.pruning import selection
from nemo_minitron.search import plan

ROWS, LENGTH = 8, 64
NAMES = [stage.ORDERED, stage.WHOLE, stage.RANKED, stage.FIRST, stage.SLICED]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A Llama whose neurons write more or less, with its scores and its own text."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = pico_llama(tmp_path_factory.mktemp("gates") / "teacher")
    tensors = {name: bits.view(np.float32) for name, bits in raw_tensors(folder).items()}
    random = np.random.default_rng(3)
    sizes = [np.exp(2 * random.normal(size=96)) for _ in range(6)]
    for layer, size in enumerate(sizes):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= size
    tensors["lm_head.weight"] *= 4
    save_tensors(folder, tensors)
    architecture = from_hf(folder)
    shapes = expected_shapes(architecture)
    scores = Scores(architecture, {axis: random.random(shape).astype("f4") for axis, shape in shapes.items()})
    scores.tensors["ffn"] = np.stack(sizes).astype("f4")
    scores.save(folder.parent / "scores.safetensors")
    torch.manual_seed(0)
    start = torch.from_numpy(random.integers(3, 509, (ROWS, 1)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(start, do_sample=True, min_new_tokens=LENGTH, max_new_tokens=LENGTH)
    write_indexed(folder.parent / "text", written.numpy())
    return folder


def opened(teacher, folder, scores=None, **keep):
    """A run after its plan: `scores` decide the plan, and are the run's."""
    keep = keep or {"ffn": 48}
    prefix = str(teacher.parent / "text")
    job = Job("pico", str(teacher), Data("a", "b"), keep=keep, gates=Gates(rows=ROWS, sequence_length=LENGTH))
    run = open_run(job, folder)
    scores = scores or Scores.load(teacher.parent / "scores.safetensors")
    scores.save(run.folder.scores)
    plan(scores, keep).save(run.folder.plan)
    run.folder.data.mkdir(exist_ok=True)
    run.folder.corpora.write_text(json.dumps(dict.fromkeys(("train", "test", "calibration"), prefix)))
    return run


def found(run):
    return {gate["name"]: gate for gate in json.loads(run.folder.gates.read_text())["gates"]}


def states(run):
    return {name: gate["state"] for name, gate in found(run).items()}


def test_a_right_cut_passes(teacher, tmp_path, capsys):
    run = opened(teacher, tmp_path / "run")
    stage.check_cut(run)
    assert states(run) == dict.fromkeys(NAMES, "passed")
    figures = found(run)
    assert figures[stage.WHOLE]["figure"] == 0
    assert 0 < figures[stage.ORDERED]["figure"] < 1e-5
    assert figures[stage.SLICED]["figure"] < 1e-5  # zeros in a sum may round nothing at all
    assert figures[stage.RANKED]["figure"] > 2 * figures[stage.RANKED]["error"] > 0
    assert json.loads(run.folder.gates.read_text())["plan"] == PrunePlan.load(run.folder.plan).digest
    assert not run.folder.gate.exists()
    said = capsys.readouterr().out
    assert all(f"    {name}: passed; " in said for name in NAMES)


def test_every_axis_at_once_passes(teacher, tmp_path):
    """Of hidden channels no mask is exact: they stay in the two models that are compared."""
    run = opened(teacher, tmp_path / "run", ffn=60, heads=3, query_groups=3, hidden=44, layers=5)
    stage.check_cut(run)
    assert {states(run)[name] for name in (stage.ORDERED, stage.WHOLE, stage.SLICED)} == {"passed"}


def test_a_cut_without_a_choice_says_so(teacher, tmp_path):
    run = opened(teacher, tmp_path / "run", layers=[0, 1, 3, 4, 5])
    stage.check_cut(run)
    assert [states(run)[name] for name in (stage.RANKED, stage.FIRST)] == ["not checked"] * 2
    run = opened(teacher, tmp_path / "hidden", hidden=40)
    stage.check_cut(run)
    assert states(run)[stage.SLICED] == "not checked"


def test_reversed_ranks_are_stopped(teacher, tmp_path):
    scores = Scores.load(teacher.parent / "scores.safetensors")
    scores.tensors["ffn"] = -scores.tensors["ffn"]
    run = opened(teacher, tmp_path / "run", scores)
    with pytest.raises(GateError, match=rf"^gate '{stage.RANKED}' failed: the loss is smaller by -.*--skip-gates"):
        stage.check_cut(run)
    assert states(run)[stage.RANKED] == states(run)[stage.FIRST] == "failed"
    assert states(run)[stage.SLICED] == "passed"
    assert not run.folder.gate.exists()


def test_ranks_that_say_nothing_are_noise(teacher, tmp_path):
    """Units of equal size: no order is better, and none is stopped."""
    scores = Scores.load(teacher.parent / "scores.safetensors")
    run = opened(teacher, tmp_path / "run", scores, heads=3)
    stage.check_cut(run)
    assert "failed" not in states(run).values()


@pytest.mark.parametrize(("tensor", "dim"), [("layers.3.up.weight", 0), ("layers.2.down.weight", 1)])
def test_a_broken_cut_is_stopped(teacher, tmp_path, monkeypatch, tensor, dim):
    """One matrix of one layer keeps the units next to those that the others keep."""

    def shifted(of, name):
        origin, index = selection.student_index(of, name)
        if name == tensor and len(index[dim]) < 96:
            index = tuple(np.sort((kept + 1) % 96) if d == dim else kept for d, kept in enumerate(index))
        return origin, index

    monkeypatch.setattr("nemo_minitron.pruning.student.student_index", shifted)
    run = opened(teacher, tmp_path / "run")
    with pytest.raises(GateError, match=f"gate '{stage.SLICED}' failed"):
        stage.check_cut(run)
    assert states(run)[stage.SLICED] == "failed"
    assert {states(run)[name] for name in (stage.ORDERED, stage.WHOLE)} == {"passed"}


def test_a_wrong_table_of_axes_is_stopped(teacher, tmp_path, monkeypatch):
    """A norm that does not move with the hidden channels: the ordered teacher is another model."""
    from nemo_minitron.pruning import rearranged

    real = rearranged.owners
    monkeypatch.setattr(
        rearranged, "owners", lambda name: [] if name == "layers.4.pre_mlp_norm.weight" else list(real(name))
    )
    run = opened(teacher, tmp_path / "run")
    with pytest.raises(GateError, match=f"^gate '{stage.ORDERED}' failed"):
        stage.check_cut(run)


def test_a_student_that_loses_a_tensor_is_stopped(teacher, tmp_path, monkeypatch):
    """Where everything is kept, too: one matrix is written with its rows in reverse."""
    from nemo_minitron.sources.folder import HFSource

    real = HFSource.stream

    def wrong(self, name, index, sink):
        if name == "layers.1.q.weight":
            sink.write(self.read(name, index)[::-1].copy())
        else:
            real(self, name, index, sink)

    monkeypatch.setattr(HFSource, "stream", wrong)
    run = opened(teacher, tmp_path / "run")
    with pytest.raises(GateError, match=f"gate '{stage.WHOLE}' failed"):
        stage.check_cut(run)


# -- the stage among the others ---------------------------------------------------------------------------------
def guarded(run, done):
    """The gates' stage with one before it, as in a job, and the one that it guards after it."""

    def make(name, *after):
        return Stage(name, lambda run: done.append(name), lambda run: None, after)

    gates = [stage.gate_stage(run.job)] if run.job.gates.run else []
    return [make("data"), make("plan"), *gates, make("prune", "plan")]


def test_a_shut_gate_stops_the_job_and_skipping_goes_on(teacher, tmp_path, monkeypatch):
    scores, done = Scores.load(teacher.parent / "scores.safetensors"), []
    scores.tensors["ffn"] = -scores.tensors["ffn"]
    run = opened(teacher, tmp_path / "run", scores)
    for until in ("", "prune"):
        with pytest.raises(GateError):
            execute(run, guarded(run, done), until)
    assert done == ["data", "plan"]
    skipping = run.job.override(["gates.run=false"])
    check_recipe(skipping, run.folder.path)
    again = open_run(skipping, run.folder.path)
    execute(again, guarded(again, done))
    assert done == ["data", "plan", "prune"]
    assert states(again)[stage.RANKED] == "failed"  # the report goes on saying so


def test_gates_decide_no_other_stage(teacher, tmp_path):
    run, done = opened(teacher, tmp_path / "run"), []
    execute(run, guarded(run, done))
    other = open_run(run.job.override(["gates.rows=4"]), run.folder.path)
    execute(other, guarded(other, done))
    assert done == ["data", "plan", "prune"]
    assert json.loads(other.folder.gates.read_text())["rows"] == 4


def test_where_the_stage_stands(teacher):
    job = Job("pico", str(teacher), Data("a", "b"), keep={"ffn": 48})
    names = [each.name for each in stages(job)]
    assert names[names.index("plan") : names.index("prune") + 1] == ["plan", "gates", "compensate", "prune"]
    assert "gates" not in [each.name for each in stages(job.override(["gates.run=false"]))]
    searched = [
        each.name for each in stages(Job("pico", str(teacher), Data("a", "b")).override(["search.params=0.9x"]))
    ]
    assert searched[searched.index("candidates") + 1] == "gates"
    assert searched.count("gates") == 1
    assert RunFolder.gates == "gates.json"
