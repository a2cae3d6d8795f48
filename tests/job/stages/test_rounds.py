"""A job in rounds: what each round is asked for, and the one plan that they make."""

import dataclasses
import json

import numpy as np
import pytest
from pico import SIZES

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.job import Calibration, Data, Job
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.dry_run import describe
from nemo_minitron.job.run import open_run
from nemo_minitron.job.stages.rounds import cut_of, job_of, round_stages


@pytest.fixture
def job(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
    calibration = Calibration(samples=4, sequence_length=16)
    job = Job("pico", str(teacher), Data("train.jsonl", "test.jsonl"), {"ffn": 64, "layers": 4}, calibration, rounds=2)
    return job.override(["distillation.sequence_length=16"])


def scores_of(architecture, seed):
    """Random, a row a layer."""
    generator, layers = np.random.default_rng(seed), architecture.num_layers
    shapes = {"ffn": (layers, architecture.ffn_hidden_size), "layers": (layers,)}
    tensors = {name: generator.random(shape, np.float32) for name, shape in shapes.items()}
    return Scores(architecture, tensors, model_digest=f"model {seed}")


def largest(values, count):
    return sorted(np.argsort(-values)[:count].tolist())


def test_two_rounds_make_one_plan_in_the_teachers_indices(job, tmp_path):
    """Layers and neurons that the second round keeps, by its own scores, looked up by hand in what the first kept."""
    source, run = from_hf(job.teacher), open_run(job, tmp_path / "run")
    first = scores_of(source, 1)
    first.save(run.path("scores.safetensors"))
    once, own, _ = cut_of(run, 1)
    assert once is own
    assert (once.target.num_layers, once.target.ffn_hidden_size) == (5, 80)
    once.save(run.path("rounds", "2", "plan.json"))
    second = scores_of(once.target, 2)
    second.save(run.path("rounds", "2", "scores.safetensors"))
    made, own, by = cut_of(run, 2)
    assert by.model_digest == "model 2"
    assert own.source == once.target
    layers = largest(first["layers"], 5)
    stay = largest(second["layers"], 4)
    assert made.keep["layers"] == [layers[i] for i in stay]
    for i in stay:
        neurons = largest(first["ffn"][layers[i]], 80)
        assert made.keep["ffn"][layers[i]] == [neurons[j] for j in largest(second["ffn"][i], 64)]
    assert (made.source, made.target, made.model_digest) == (source, own.target, "model 1")
    made.save(run.path("plan.json"))
    assert PrunePlan.load(run.path("plan.json")) == made


def test_each_round_gathers_what_its_own_cut_needs(job):
    """By loss each round drops its own number of layers; one that drops none asks for no criterion."""
    source, loss = from_hf(job.teacher), dataclasses.replace(job, depth="loss", keep={"ffn": 64, "layers": 5}, rounds=3)
    sizes = [job_of(loss, source, number)[0].keep["layers"] for number in (1, 2, 3)]
    assert sizes == [6, 5, 5]
    assert calibration_of(loss, source).depth == ()
    made, model = job_of(loss, source, 2)
    assert (calibration_of(made, model).depth, calibration_of(made, model).depth_sizes) == (("loss",), (1,))
    made, model = job_of(loss, source, 3)
    assert (made.depth, calibration_of(made, model).depth) == ("block_influence", ())
    both = dataclasses.replace(loss, keep={"layers": 2}, rounds=2)
    assert calibration_of(both, source).depth_sizes == (1, 2)
    with pytest.raises(InputError, match="depth 'loss' chooses layers, but the recipe drops none"):
        calibration_of(dataclasses.replace(loss, keep={"ffn": 64}), source)


def test_a_round_runs_in_the_nearest_layout_that_its_model_allows(job):
    split = job.override(["layout.tp=3"])
    assert job_of(split, from_hf(job.teacher), 1)[0].layout.tp == 3
    assert job_of(split, from_hf(job.teacher), 2)[0].layout.tp == 1  # 80 neurons


def test_the_dry_run_tells_the_rounds(job):
    text = describe(job)
    assert "round 1 of 2: ffn 80, layers 5, " in text
    assert "round 2 of 2: ffn 64, layers 4, " in text
    assert "stages: data, estimate, round 2, plan, gates, compensate, prune" in text
    assert [(stage.name, stage.after) for stage in round_stages(dataclasses.replace(job, rounds=3))] == [
        ("round 2", ("estimate",)),
        ("round 3", ("round 2",)),
    ]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rounds=33", "rounds=33 leaves some round nothing to cut; the nearest legal number is 32"),
        ("keep.layers=[0,1,2]", "the layers that stay are listed"),
        ("search.params=1M", "rounds=2 needs sizes in keep; a search finds the sizes of a single cut"),
        ("calibration.depth_sizes=[5]", "depth_sizes 5 is not legal in a model of 5 layers"),
    ],
)
def test_rounds_that_could_not_run_are_refused(job, setting, words):
    with pytest.raises(InputError, match=words):
        describe(job.override([setting, "calibration.depth=loss"]))
