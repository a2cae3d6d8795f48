"""`minitron compensate` and what `prune` puts in place of slices, at the command line, against numbers by hand."""

import dataclasses
import json
import shutil
import sys

import forked
import numpy as np
import pytest
from command_line import minitron, start
from grams64 import grams64
from pico import raw_tensors
from tolerances import GRAM_FP32

from nemo_minitron.artifacts import Compensation, PrunePlan, Scores
from nemo_minitron.cli.find import find
from nemo_minitron.commands.compensate import solve_for
from nemo_minitron.families import from_hf
from nemo_minitron.job import Calibration, Layout
from nemo_minitron.job.run import open_run
from nemo_minitron.job.stages import compress as stages
from nemo_minitron.pruning import HFSource
from nemo_minitron.pruning.compensation import fold_norms, solvable, solve
from nemo_minitron.pruning.convert import convert
from nemo_minitron.pruning.defaults import RIDGE
from nemo_minitron.pruning.gaps import gap_scales, gaps
from nemo_minitron.pruning.ridge import RIDGES
from nemo_minitron.search import random_plan
from nemo_minitron.sources.tensors import whole

pytestmark = pytest.mark.slow
KEEP = {"ffn": 60, "hidden": 40, "layers": 4, "heads": 3}
ROWS = ["--data", "corpus.jsonl", "--samples", 6, "--sequence-length", 36]


@pytest.fixture(scope="module")
def plan(world):
    plan = random_plan(from_hf(world / "teacher"), keep=KEEP)
    plan.save(world / "compensated.json")
    return plan


@pytest.fixture(scope="module")
def solved(world, plan):
    minitron(world, "compensate", "teacher", "compensated.json", *ROWS, "--out", "c.safetensors")
    return Compensation.load(world / "c.safetensors")


def corpus(world):
    """The prefix of the tokens of the text, as the command makes them in a folder that it removes."""
    from nemo_minitron.commands.corpus import tokenise

    return tokenise(str(world / "corpus.jsonl"), world / "teacher", world / "tokens" / "rows", 509).prefix


def grams(world):
    """By the book, of the rows that the command drew."""
    from nemo_minitron.data import Tokens

    rows = Tokens(corpus(world)).windows(36, 6, 1234)
    return grams64(world / "teacher", rows)


def test_matrices_by_hand(world, plan, solved):
    by_the_book, source = grams(world), HFSource(world / "teacher")
    assert set(solved.tensors) == dict(solvable(plan)).keys()
    assert len(solved.tensors) == 8
    for name, origin in solvable(plan):
        expected = solve(source, plan, name, by_the_book[origin])
        np.testing.assert_allclose(solved.tensors[name], expected, rtol=0, atol=100 * GRAM_FP32, err_msg=name)
    assert solved.notes["method"] == "least squares"


@pytest.mark.usefixtures("forking")
def test_a_ridge_for_each_matrix(world, plan):
    """`--ridge auto`, in one process and in two pipeline stages, which have room for a layer's matrices."""
    minitron(world, "compensate", "teacher", "compensated.json", *ROWS, "--ridge", "auto", "--out", "auto.safetensors")
    rows, calibration, outs = corpus(world), Calibration(6, 36, 2, seed=1234), {}
    outs[world / "compensated.json"] = world / "auto2.safetensors"
    solve_for(HFSource(world / "teacher"), outs, rows, calibration, Layout(pp=2), ridge="auto", memory=1000)
    found, again = (Compensation.load(world / f"auto{n}.safetensors") for n in ("", 2))
    ridges = found.notes["ridge of each matrix"]
    assert ridges == again.notes["ridge of each matrix"]
    assert found.notes["ridge"] == "auto"
    by_the_book, source = grams(world), HFSource(world / "teacher")
    for name, origin in solvable(plan):
        exact = RIDGES[np.argmin(np.abs(RIDGES - ridges[name]))]
        expected, bound = solve(source, plan, name, by_the_book[origin], exact), 100 * GRAM_FP32 * max(1, RIDGE / exact)
        for tensors in (found.tensors, again.tensors):
            np.testing.assert_allclose(tensors[name], expected, rtol=0, atol=bound, err_msg=name)


@pytest.mark.usefixtures("forking")
def test_plans_stages_and_layers_one_by_one(world, plan, solved):
    """Two plans at once in two pipeline stages, memory for the matrices of one layer: the same, and by hand. What a
    killed run left is gone."""
    other = random_plan(from_hf(world / "teacher"), keep={"ffn": 48}, seed=1)
    other.save(world / "other.json")
    outs = {world / "compensated.json": world / "c2.safetensors", world / "other.json": world / "c3.safetensors"}
    (world / "c3.safetensors.parts").mkdir()
    (world / "c3.safetensors.parts" / "layers.9.down.weight.npy").write_text("no matrix")
    rows, calibration = corpus(world), Calibration(6, 36, 2, seed=1234)
    solve_for(HFSource(world / "teacher"), outs, rows, calibration, Layout(pp=2), memory=1000)
    both = [Compensation.load(out) for out in outs.values()]
    assert list(both[0].tensors) == list(solved.tensors)
    by_the_book, source = grams(world), HFSource(world / "teacher")
    expected = [solved.tensors, {n: solve(source, other, n, by_the_book[origin]) for n, origin in solvable(other)}]
    for found, tensors in zip(both, expected, strict=True):
        assert found.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(found.tensors[name], tensor, rtol=0, atol=100 * GRAM_FP32, err_msg=name)
    assert not list(world.glob("*.parts"))


def test_students(world, plan, solved):
    """What is solved and what is folded lie in the student; all else is the plain cut's."""
    minitron(world, "prune", "teacher", "compensated.json", "plain")
    minitron(
        world, "prune", "teacher", "compensated.json", "changed", "--compensation", "c.safetensors", "--fold-norms"
    )
    folded = fold_norms(HFSource(world / "teacher"), plan)
    names = {part: name for name, (part,) in HFSource(world / "plain").family.hf_tensors(plan.target).items()}
    expected = raw_tensors(world / "plain")
    expected |= {names[n]: t.view(np.uint32) for n, t in (dict(solved.tensors) | folded).items()}
    found = raw_tensors(world / "changed")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    note = json.loads((world / "changed" / "minitron_compensation.json").read_text())
    assert note["folded norms"] is True
    assert note["tensors"] == sorted([*solved.tensors, *folded])


def test_a_nemo_checkpoint_takes_them_too(world):
    """The live student is filled with the same bytes as the folder."""
    training = world / "run" / "checkpoints" / "distilled"
    checkpoint = training / json.loads((training / "last.json").read_text())["checkpoint"]
    random_plan(from_hf(world / "run" / "student"), keep={"ffn": 48, "hidden": 40}).save(world / "folded.json")
    for model, out in ((checkpoint, "folded-nemo"), ("run/student", "folded-folder")):
        minitron(world, "prune", model, "folded.json", out, "--fold-norms")
    ours = raw_tensors(convert(world / "folded-nemo", world / "folded-back"))
    theirs = raw_tensors(world / "folded-folder")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    assert (world / "folded-nemo" / "minitron_compensation.json").is_file()


def test_the_stage_of_a_job(world):
    """A finished run has solved what follows its cut of neurons; asked not to, its pruned student has the slices."""
    job = find(str(world / "run" / "recipe.json"))
    names = [stage.name for stage in stages.stages(job)]
    job = dataclasses.replace(job, teacher=str(world / "teacher")).override(["cutting.compensate=false"])
    assert set(names) - {stage.name for stage in stages.stages(job)} == {"compensate"}
    shutil.copytree(world / "run", world / "run2")
    stages.prune(open_run(job, world / "run2"))
    solved = Compensation.load(world / "run" / "compensation.safetensors")
    assert set(solved.tensors) == {f"layers.{n}.down.weight" for n in range(5)}
    found, plain = (raw_tensors(world / name / "checkpoints" / "pruned") for name in ("run", "run2"))
    for name, tensor in plain.items():
        ours = solved.tensors.get(name.replace("model.", "").replace("mlp.down_proj", "down"))
        np.testing.assert_array_equal(found[name], tensor if ours is None else ours.view(np.uint32), err_msg=name)
        assert ours is None or not np.array_equal(found[name], tensor), name


def check_scaled(scaled, slices, plan, scales):
    """A folder of slices times the factors; nothing else differs."""
    assert scales
    plain, found = raw_tensors(slices), raw_tensors(scaled)
    for name, (part,) in HFSource(slices).family.hf_tensors(plan.target).items():
        by = scales.get(part, 1.0)
        expected = (plain[name].view(np.float32).astype(np.float64) * by).astype(np.float32)
        np.testing.assert_array_equal(found[name].view(np.float32), expected, err_msg=name)
        assert np.array_equal(found[name], plain[name]) == (part not in scales), name


def test_one_sample_is_no_two_halves(world, plan):
    """Refused after the pass over the text, because only the ranks deal samples; no part of the file stays."""
    rows = ["--data", "corpus.jsonl", "--samples", 1, "--sequence-length", 36]
    process = start(world, "compensate", "teacher", "compensated.json", *rows, "--ridge", "auto", "--out", "one.file")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    assert "all samples fell into one half; give more samples" in output.splitlines()[-1]
    assert not list(world.glob("one.file*"))


def test_scaled_behind_dropped_layers(world, plan):
    """By the command, from a file of scores: slices times the factors, and a note; nothing else changes."""
    scores = Scores.load(world / "run" / "scores.safetensors")
    scales = gap_scales(plan, scores)
    minitron(world, "prune", "teacher", "compensated.json", "slices")
    minitron(
        world, "prune", "teacher", "compensated.json", "scaled", "--scale-gaps", "--scores", "run/scores.safetensors"
    )
    check_scaled(world / "scaled", world / "slices", plan, scales)
    note = json.loads((world / "scaled" / "minitron_compensation.json").read_text())
    assert set(note["scaled behind dropped layers"].values()) == set(scales.values())


def test_filled_gaps(world, plan, solved):
    """Matrices in front of dropped layers are others, and all that writes behind these is scaled, by one file alone."""
    minitron(world, "compensate", "teacher", "compensated.json", *ROWS, "--fill-gaps", "--out", "filled.safetensors")
    minitron(world, "prune", "teacher", "compensated.json", "filled", "--compensation", "filled.safetensors")
    made, ends = Compensation.load(world / "filled.safetensors"), gaps(plan)
    assert ends
    in_front = {f"layers.{plan.kept_layers.index(gap.first - 1)}.down.weight" for gap in ends if gap.first}
    changed = {
        n for n, t in made.tensors.items() if n not in solved.tensors or np.abs(t - solved.tensors[n]).max() > 1e-3
    }
    assert changed == in_front
    assert made.scales.keys() == {
        f"layers.{place}.{local}.weight"
        for place, layer in enumerate(plan.kept_layers) if any(gap.behind <= layer for gap in ends)
        for local in ("o", "down")
    }  # fmt: skip
    student = HFSource(world / "filled")
    for name, tensor in made.tensors.items():
        found = student.read(name, whole(tensor.shape)).view(np.float32)
        np.testing.assert_array_equal(found, (tensor.astype(float) * made.scales.get(name, 1.0)).astype(np.float32))
    note = json.loads((world / "filled" / "minitron_compensation.json").read_text())
    assert set(note["filled gaps"]) == in_front


def test_vocabulary(world):
    """Tokens ranked, fewest that stay, and the student's text is the teacher's."""
    from transformers import AutoTokenizer

    minitron(world, "rank-tokens", "teacher", "--data", "corpus.jsonl", "--out", "tokens.safetensors")
    minitron(world, "plan", "tokens.safetensors", "--keep", "vocab=460", "--out", "vocab.json")
    minitron(world, "prune", "teacher", "vocab.json", "fewer")
    assert from_hf(world / "fewer").vocab_size == 460
    old, new = (AutoTokenizer.from_pretrained(world / name) for name in ("teacher", "fewer"))
    for text in ("the model number 7 reads words", "zebras!"):
        assert new.decode(new(text).input_ids) == old.decode(old(text).input_ids) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compensate", "teacher", "layers.json", *ROWS], "cuts no neurons and no heads"),
        (["compensate", "teacher", "compensated.json", *ROWS, "--ridge", 0], "ridge is 0.0; it must be above 0"),
        (["compensate", "teacher", "compensated.json", *ROWS, "--ridge", "best"], "a number, or auto"),
        (["compensate", "run/student", "compensated.json", *ROWS], "made for another model"),
        (["compensate", "teacher", "layers.json", *ROWS, "--reconstruct", 1], "cuts no neurons and no heads"),
        (
            ["compensate", "teacher", "compensated.json", *ROWS, "--reconstruct", 1, "--reconstruct-batch", 4],
            "6 calibration rows are fewer than two steps of reconstruct_batch=4",
        ),
        (["prune", "teacher", "layers.json", "s", "--compensation", "c.safetensors"], "made for another plan"),
        (["prune", "teacher", "layers.json", "s", "--fold-norms"], "cuts no hidden channels"),
        (
            ["prune", "teacher", "compensated.json", "s", "--head-residual", "paper"],
            "need --scores; give it with at least one of them",
        ),
        (["rank-tokens", "teacher", "--data", "corpus.jsonl", "--out", "c.safetensors"], "is no file of scores"),
        (
            ["compensate", "teacher", "neurons.json", *ROWS, "--fill-gaps"],
            "drops no layers, so there is no gap to fill",
        ),
        (
            [
                "prune",
                "teacher",
                "compensated.json",
                "s",
                "--compensation",
                "gaps.safetensors",
                "--scale-gaps",
                "--scores",
                "run/scores.safetensors",
            ],
            "scales what is behind them; leave --scale-gaps out",
        ),
    ],
)
def test_refusals(world, solved, arguments, message):
    source = from_hf(world / "teacher")
    plan = PrunePlan(source=source, target=source.replace(num_layers=2), keep={"layers": [0, 5]})
    plan.save(world / "layers.json")
    random_plan(source, keep={"ffn": 60}).save(world / "neurons.json")
    whole_plan = PrunePlan.load(world / "compensated.json")
    Compensation(whole_plan.digest, {}, scales={"layers.3.o.weight": 0.5}).save(world / "gaps.safetensors")
    command = [sys.executable, "-m", "nemo_minitron.cli", *map(str, arguments)]
    done = forked.run(command, cwd=world)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (world / "s").exists()
