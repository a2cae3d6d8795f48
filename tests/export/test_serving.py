"""How a student is served: the engines' commands, and the throughput script on its fallback."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from pico import pico_llama, pico_qwen2_moe
from typer.testing import CliRunner

from nemo_minitron.cli import app
from nemo_minitron.errors import InputError
from nemo_minitron.export import serving_commands

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    return pico_llama(folder / "teacher"), pico_llama(folder / "a student", num_hidden_layers=2)


def test_commands_of_all_engines(models):
    student = models[1]
    assert serving_commands(student, tp=2) == {
        "vllm": [f"vllm serve '{student}' --dtype bfloat16 --tensor-parallel-size 2"],
        "tensorrt_llm": [f"trtllm-serve '{student}' --tp_size 2"],
        "llama_cpp": [
            f"python convert_hf_to_gguf.py '{student}' --outfile a-student.gguf --outtype bf16",
            "llama-server --model a-student.gguf",
        ],
        "ollama": [
            "echo 'FROM ./a-student.gguf' > a-student.Modelfile",
            "ollama create a-student --file a-student.Modelfile",
            "ollama run a-student",
        ],
    }
    fp8 = serving_commands(student, precision="fp8")
    assert fp8["vllm"][0].endswith("--tensor-parallel-size 1 --quantization fp8")
    assert f"--qformat fp8 --export_path '{student}-fp8'" in fp8["tensorrt_llm"][0]
    assert fp8["tensorrt_llm"][1] == f"trtllm-serve '{student}-fp8' --tp_size 1"
    assert list(fp8) == ["vllm", "tensorrt_llm"]  # llama.cpp has no FP8
    shown = CliRunner().invoke(app, ["serving", str(student), "--tp", "2"]).output.splitlines()
    assert shown[:2] == ["# vllm", serving_commands(student, tp=2)["vllm"][0]]


def test_a_folder_without_its_weights_is_refused(models, tmp_path):
    folder = shutil.copytree(models[0], tmp_path / "cut")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    for words in ("is the download complete", "safetensors"):
        found = CliRunner().invoke(app, ["serving", str(folder)])
        assert words in str(found.exception)
        assert not found.output
        weights.unlink(missing_ok=True)


PLAIN = {"qkv_bias": False}
DENSE = PLAIN | {"mlp_only_layers": [1]}


@pytest.mark.parametrize(
    ("fields", "engines", "words"),
    [
        ({}, ["vllm", "tensorrt_llm", "llama_cpp", "ollama"], []),
        (
            PLAIN,
            ["llama_cpp", "ollama"],
            ["vllm is left out: it always adds biases", "tensorrt_llm is left out: it al"],
        ),
        ({"norm_topk_prob": True}, ["vllm", "tensorrt_llm"], ["llama_cpp is left out: it never normalizes"]),
        ({"hidden_act": "gelu"}, ["tensorrt_llm"], ["vllm is left out: it has silu alone, and hidden_act is gelu"]),
        ({"mlp_only_layers": [1]}, ["vllm"], ["llama_cpp is left out: it makes a mixture of every layer"]),
    ],
)
def test_an_engine_that_runs_another_model_is_left_out_by_name(fields, engines, words, tmp_path):
    """A Qwen2-MoE whose config says what the engine's class does not read."""
    folder = pico_qwen2_moe(tmp_path / "t", num_hidden_layers=2, **fields)
    assert list(serving_commands(folder)) == engines
    heads = [line for line in CliRunner().invoke(app, ["serving", str(folder)]).output.splitlines() if line[:2] == "# "]
    remarks = [line for line in heads if line.startswith("# remark: ")]
    assert [line[2:].split(";")[0] for line in heads if line not in remarks] == engines
    assert all(any(word in remark for remark in remarks) for word in words)
    assert bool(remarks) == bool(words)


def test_a_model_that_no_engine_runs_is_refused(tmp_path):
    folder = pico_qwen2_moe(tmp_path / "t", num_hidden_layers=2, **DENSE)
    with pytest.raises(InputError, match=r"no engine is known to .*: vllm always adds .*llama_cpp makes a mixture of"):
        serving_commands(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp": 4}, "tp=4 does not divide 6 heads; the nearest legal tp is 3"),
        ({"tp": 0}, "the nearest legal tp is 1"),
        ({"precision": "fp9"}, "precision 'fp9' is unknown to the engines; did you mean 'fp8'"),
    ],
)
def test_what_no_engine_takes_is_refused(models, options, words):
    with pytest.raises(InputError, match=words):
        serving_commands(models[1], **options)


@pytest.fixture
def script(monkeypatch):
    """The benchmark as a module; it finds its neighbour `common` as when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    spec = importlib.util.spec_from_file_location("serving_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_compares_teacher_and_student(script, models, tmp_path, capsys):
    options = ["--input", "5", "--output", "3", "--requests", "2", "--repeat", "3", "--engine", "transformers"]
    rows = script.main([*map(str, models), *options, "--out", str(tmp_path / "found.json")])
    assert [(row["model"], row["precision"]) for row in rows] == [(str(model), "bf16") for model in models]
    assert rows[1]["parameters"] < rows[0]["parameters"]
    for row in rows:
        assert len(row["seconds"]) == 3
        assert row["requests_a_second"] == 2 / sorted(row["seconds"])[1]
        assert row["tokens_a_second"] == 3 * row["requests_a_second"]
    printed = capsys.readouterr().out
    assert "transformers runs no FP8 here" in printed
    assert "2 requests at once, 5 tokens in, 3 out" in printed
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == rows


def test_the_table_compares_within_a_precision(script):
    rates = {("t", "bf16"): 2.0, ("s", "bf16"): 3.6, ("t", "fp8"): 3.0, ("s", "fp8"): 5.4}
    rows = [
        {"model": model, "precision": precision, "parameters": 1, "requests_a_second": rate, "tokens_a_second": 1.0}
        for (model, precision), rate in rates.items()
    ]
    speeds = [float(line.split()[-1]) for line in script.table(rows).splitlines()[1:]]
    assert speeds == [1.0, 1.8, 1.0, 1.8]
