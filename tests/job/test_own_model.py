"""A recipe for a user's own model: what is derived from the model, its text and the machine, and what is refused."""

import dataclasses
import json

import pytest
from pico import SIZES
from typer.testing import CliRunner

from nemo_minitron.cli import app
from nemo_minitron.costs import training_memory
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.job import Data, Layout
from nemo_minitron.job.own_model import FULL, ON_A_CPU, ON_GPUS, Machine, job_of, layout_on
from nemo_minitron.settings.own_model import OwnModel

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A folder with a config; weights are not read."""
    config = {"architectures": ["LlamaForCausalLM"], **SIZES, "max_position_embeddings": 64}
    return folder(tmp_path / "my model", config)


def folder(path, config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(40)))
    return str(tmp_path / "text.jsonl")


def test_on_a_cpu(model, text):
    job = job_of(model, OwnModel(data=text, params="0.8x"), Machine())
    assert job.name == "my_model_to_0.8x"
    assert job.data == Data(train=f"{text}@rest", test=f"{text}@held_out")
    assert job.search.params == str(round(0.8 * from_hf(model).parameters()))
    assert job.distillation.tokens == ON_A_CPU.tokens
    assert (job.calibration.sequence_length, job.distillation.sequence_length) == (64, 64)  # the model's positions
    assert job.distillation.learning_rate == 3e-4
    assert job.layout == Layout()


def test_a_short_training_warms_up_for_a_tenth_of_its_steps(model, text):
    settings = job_of(model, OwnModel(data=text, keep="ffn=64", tokens=640), Machine()).distillation
    assert (settings.steps, settings.warmup_steps, settings.save_every) == (10, 1, 2)
    assert settings.min_learning_rate == 3e-5


def test_what_the_steps_decide_follows_an_override_and_gives_way_to_one(model, text):
    own = OwnModel(data=text, keep="ffn=64")
    short = job_of(model, own, Machine(), overrides=["distillation.tokens=1280"]).distillation
    assert (short.steps, short.warmup_steps, short.save_every) == (20, 2, 5)
    asked = ["distillation.tokens=1280", "distillation.warmup_steps=7", "distillation.save_every=3"]
    settings = job_of(model, own, Machine(), overrides=asked).distillation
    assert (settings.steps, settings.warmup_steps, settings.save_every) == (20, 7, 3)


def test_gates_are_in_fp32_where_the_model_is_sure_to_fit(model, tmp_path, text):
    llama = folder(tmp_path / "llama", LLAMA_8B)
    for given, machine, precision in (
        (model, Machine(), "fp32"),
        (llama, Machine(), "auto"),
        (llama, Machine(1, 80 * 10**9), "fp32"),  # 32 GB
        (llama, Machine(1, 24 * 10**9), "auto"),
    ):
        job = job_of(given, OwnModel(data=text, keep="ffn=64"), machine)
        assert (job.gates.run, job.gates.precision) == (True, precision)


def test_on_gpus(tmp_path):
    model = folder(tmp_path / "llama", LLAMA_8B)
    job = job_of(model, OwnModel(data="org/corpus", keep="ffn=9216"), Machine(8))
    assert job.keep == {"ffn": 9216}
    assert not job.search.wanted
    assert job.data == Data(train="org/corpus", test="org/corpus")  # the splits of that name
    assert job.distillation.learning_rate == 1e-4
    assert (job.distillation.sequence_length, job.distillation.global_batch_size) == (4096, ON_GPUS.batch)
    assert job.layout.processes == 8
    searched = job_of(model, OwnModel(data="org/corpus", memory="8GiB"), Machine(8), Layout(tp=4, dp=2))
    assert (searched.layout, searched.search.divisors) == (Layout(tp=4, dp=2), "tp=4")


@pytest.mark.parametrize(("gpus", "memory"), [(1, 80e9), (2, 80e9), (4, 80e9), (8, 80e9), (8, 640e9), (6, 80e9)])
def test_the_least_tensor_parallelism_that_fits(gpus, memory):
    source = from_hf(LLAMA_8B)
    layout = layout_on(Machine(gpus, int(memory)), source, 4096)

    def fits(layout):
        needed = training_memory(source, layout, batch=1, context=4096, teacher=source, micro_batches=1)
        return sum(needed.values()) <= FULL * memory

    assert layout.processes == gpus
    smaller = [tp for tp in range(1, layout.tp) if gpus % tp == 0 and source.num_query_groups % tp == 0]
    assert not any(fits(dataclasses.replace(layout, tp=tp, dp=gpus // tp, sp=tp > 1)) for tp in smaller)
    assert fits(layout) or layout.tp == max(n for n in (1, 2, 4, 8) if gpus % n == 0)


def test_experts_with_biases_are_whole():
    gpt_oss = LLAMA_8B | {"architectures": ["GptOssForCausalLM"], "num_local_experts": 32}
    layout = layout_on(Machine(8, int(40e9)), from_hf(gpt_oss), 4096)
    assert (layout.tp > 1, layout.etp) == (True, 1)
    layout.check(from_hf(gpt_oss))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"params": "0.8x"}, "is a model, and its text is missing; give --data"),
        ({"data": "{text}"}, "no size given; give one of --params 0.7x"),
        ({"data": "{text}", "params": "1M", "keep": "ffn=64"}, "--params and --keep given; give one of"),
        ({"data": "{text}@rest", "params": "1M"}, "has no part that can be held out; give held-out text with --test"),
        ({"data": "{model}/config.json", "params": "1M"}, "is not a file of text: legal are"),
    ],
)
def test_refused(model, text, own, words):
    given = {name: value.format(text=text, model=model) for name, value in own.items()}
    with pytest.raises(InputError, match=words):
        job_of(model, OwnModel(**given), Machine())


def test_the_command_line(model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, ["compress", model, "--data", text, "--keep", "ffn=64", "--tokens", "1k", "--dry-run"]
    )
    assert done.exit_code == 0, done.output
    assert "  tokens: 1000\n" in done.output
    assert f"  train: {text}@rest\n" in done.output
    for command, words in (
        (["smollm2_135m_to_108m_width", "--tokens", "5"], "--tokens is for a model of your own"),
        ([model], "its text is missing"),
        ([str(tmp_path / "nowhere"), "--data", text, "--keep", "ffn=64"], "does not exist"),
    ):
        refused = CliRunner().invoke(app, ["compress", *command, "--dry-run"])
        assert words in str(refused.exception)
    assert not (tmp_path / "runs").exists()
