"""Bad input at the command line: one clear sentence, exit code 2, no traceback, nothing written."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from pico import pico_llama
from words import save_tokenizer

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Scores
from nemo_minitron.families import from_hf
from nemo_minitron.search import random_plan

TEXTS = [f"the model number {i} reads {i * 7} words and ends." for i in range(60)]


def minitron(*arguments, cwd=None):
    command = [sys.executable, "-m", "nemo_minitron.cli", *map(str, arguments)]
    return forked.run(command, cwd=cwd)


def refused(done, *words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("minitron: ")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, a plan for it, a corpus and a recipe over them."""
    folder = tmp_path_factory.mktemp("refusals")
    pico_llama(folder / "teacher", vocab_size=512)
    save_tokenizer(folder / "teacher", TEXTS, 512)
    random_plan(from_hf(folder / "teacher"), keep={"ffn": 64}).save(folder / "plan.json")
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "recipe.py").write_text(
        "from nemo_minitron.job import *\n"
        "def recipe():\n"
        f"    return Job('pico', {str(folder / 'teacher')!r}, Data({str(folder / 'corpus.jsonl')!r},"
        f" {str(folder / 'corpus.jsonl')!r}), keep={{'ffn': 64}}, calibration=Calibration(2, 16))\n"
    )
    return folder


@pytest.fixture
def broken(world, tmp_path):
    """A copy of the teacher to break."""
    import shutil

    return Path(shutil.copytree(world / "teacher", tmp_path / "broken"))


def prune(model, world, tmp_path):
    done = minitron("prune", model, world / "plan.json", tmp_path / "student")
    assert not (tmp_path / "student").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".student")]
    return done


def test_missing_folder(world, tmp_path):
    refused(prune(tmp_path / "nowhere", world, tmp_path), "does not exist")


def test_folder_without_config(world, broken, tmp_path):
    (broken / "config.json").unlink()
    refused(prune(broken, world, tmp_path), "no config.json")


def test_truncated_safetensors(world, broken, tmp_path):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(prune(broken, world, tmp_path), "model.safetensors")


def test_corrupted_safetensors(world, broken, tmp_path):
    (broken / "model.safetensors").write_bytes(b"\xff" * 4096)
    refused(prune(broken, world, tmp_path), "model.safetensors")


class Hostile:
    def __reduce__(self):
        return (open, (str(Hostile.mark), "w"))


def test_pickle_in_the_place_of_safetensors_is_never_loaded(world, broken, tmp_path):
    Hostile.mark = tmp_path / "mark"
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    refused(prune(broken, world, tmp_path), "pytorch_model.bin")
    (broken / "model.safetensors").write_bytes(pickle.dumps(Hostile()))
    refused(prune(broken, world, tmp_path), "model.safetensors")
    assert not Hostile.mark.exists()


def test_unknown_architecture(world, broken, tmp_path):
    config = json.loads((broken / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (broken / "config.json").write_text(json.dumps(config))
    refused(prune(broken, world, tmp_path), "GPT2LMHeadModel", "supported are: LlamaForCausalLM")


def test_plan_for_another_model(world, tmp_path):
    other = pico_llama(tmp_path / "other", vocab_size=512, intermediate_size=80)
    refused(prune(other, world, tmp_path), "ffn_hidden_size")


def test_no_disk_space(world, tmp_path, monkeypatch):
    """The check is before the first byte; a disk of 1 kB is feigned, nothing else."""
    script = (
        "import shutil, collections, sys; usage = collections.namedtuple('u', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(2000, 1000, 1000)\n"
        "from nemo_minitron.cli import main; main()"
    )
    arguments = ["prune", str(world / "teacher"), str(world / "plan.json"), str(tmp_path / "student")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    refused(done, "GB free")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["keep.ffn=97"], ["ffn=97", "nearest is 96"]),
        (["--tp", "2"], ["tp=2", "3 query groups", "nearest legal tp is 1"]),
        (["distillation.token=3"], ["distillation.token", "did you mean 'distillation.tokens'"]),
        (["teacher=/nowhere"], ["'/nowhere' does not exist"]),
        (["calibration.samples=x"], ["must be a whole number"]),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_recipes_refused_before_anything_is_loaded(world, tmp_path, arguments, words, dry):
    flags = ["--dry-run"] if dry else []
    refused(minitron("compress", world / "recipe.py", *arguments, *flags, "--out", tmp_path / "run"), *words)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(world, tmp_path):
    done = minitron("compress", world / "recipe.py", "--dry-run", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing was loaded or written" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["estimate", "compensate", "plan", "candidates", "rank-tokens"])
def test_a_file_that_exists_is_replaced_only_when_asked(world, tmp_path, command):
    """Whatever the command would write, before it reads anything."""
    out, model = tmp_path / "mine.json", world / "teacher"
    there = out
    if command == "candidates":
        there = tmp_path / "mine.candidates.csv"
    there.write_text("mine")
    counted = Scores(from_hf(model), {"vocab": np.arange(512, dtype=np.float32)})
    counted.save(world / "counted.safetensors")
    if command == "rank-tokens":
        counted.save(out)
    before = there.read_bytes()
    arguments = {
        "estimate": (model, "--data", world / "corpus.jsonl"),
        "compensate": (model, world / "plan.json", "--data", world / "corpus.jsonl"),
        "plan": (world / "counted.safetensors", "--keep", "vocab=256"),
        "candidates": ("--architecture", model, "--params", "0.7x"),
        "rank-tokens": (model, "--data", world / "corpus.jsonl"),
    }[command]
    plans = command in ("plan", "candidates")
    command = "plan" if plans else command
    refused(minitron(command, *arguments, "--out", out), there.name, "already", "--overwrite")
    assert there.read_bytes() == before
    assert list(tmp_path.iterdir()) == [there]
    if plans or command == "rank-tokens":
        done = minitron(command, *arguments, "--out", out, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert there.read_bytes() != before


@pytest.mark.parametrize("kind", ["folder", "file", "student"])
def test_distill_replaces_nothing_of_somebody_elses(world, tmp_path, kind):
    out = world / "teacher" if kind == "student" else tmp_path / "mine"
    if kind == "folder":
        out.mkdir()
        (out / "photo.jpg").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    before = sorted(out.parent.rglob("*"))
    arguments = ["--teacher", world / "teacher", "--data", world / "corpus.jsonl", "--tokens", 64, "--out", out]
    refused(minitron("distill", world / "teacher", *arguments), "give a")
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize("out", ["mine.safetensors", "new.safetensors"])
def test_scores_may_be_merged_into_their_own_file_or_a_new_one(world, tmp_path, out):
    """Neither is refused for being there or not; what is merged must be scores."""
    (tmp_path / "mine.safetensors").write_text("mine")
    merge = ("--merge", tmp_path / "mine.safetensors", "--out", tmp_path / out)
    done = minitron("estimate", world / "teacher", "--data", world / "corpus.jsonl", *merge)
    refused(done, "mine.safetensors", "is no file of scores")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_unknown_recipe():
    refused(minitron("compress", "smollm2_135m_to_108m_widht"), "did you mean 'smollm2_135m_to_108m_width'")


@pytest.mark.slow
@pytest.mark.parametrize(("text", "words"), [("", ["empty"]), ("short.", ["tokens"])])
def test_empty_or_short_corpus(world, tmp_path, text, words):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text)
    out = tmp_path / "scores.safetensors"
    done = minitron(
        "estimate", world / "teacher", "--data", corpus, "--samples", 4, "--sequence-length", 64, "--out", out
    )
    refused(done, *words)
    assert not out.exists()


def checkpoint(folder, metadata=b"", context=None):
    """The shape of a NeMo checkpoint with what a test puts into it."""
    (folder / "weights").mkdir(parents=True)
    (folder / "context").mkdir()
    (folder / "weights" / ".metadata").write_bytes(metadata)
    (folder / "context" / "io.json").write_text(json.dumps(context or CONTEXT))
    fields = {"hidden_size": 48, "num_layers": 2, "num_attention_heads": 6, "num_query_groups": 3, "kv_channels": 8}
    fields |= {"ffn_hidden_size": 96, "vocab_size": 512, "share_embeddings_and_output_weights": False}
    fields |= {"init_method_std": 0.02, "layernorm_epsilon": 1e-5, "seq_length": 64, "rotary_base": 10000}
    fields |= {"add_bias_linear": False}
    (folder / "context" / "model.yaml").write_text(json.dumps({"config": fields}))
    return folder


def _object(name, items, module="nemo.collections.llm.gpt.model.llama"):
    return {
        f"{name}_1": {"type": {}, "items": items, "metadata": {"key": f"{name}_m"}},
        f"{name}_m": {"items": [["Attr(name='fn_or_cls')", {"module": module, "name": name}]], "metadata": None},
    }


CONTEXT = {
    "root": {"key": "TrainerContext_1"},
    "objects": _object("TrainerContext", [["Attr(name='model')", {"type": "ref", "key": "LlamaModel_1"}]])
    | _object("LlamaModel", [["Attr(name='config')", {"type": "ref", "key": "LlamaConfig_1"}]])
    | _object("LlamaConfig", []),
}


@pytest.mark.slow
def test_hostile_metadata_runs_nothing(world, tmp_path):
    Hostile.mark = tmp_path / "mark"
    model = checkpoint(tmp_path / "model", pickle.dumps(Hostile()))
    done = minitron("estimate", model, "--data", world / "corpus.jsonl", "--out", tmp_path / "scores.safetensors")
    refused(done, "was refused", "open")
    assert not Hostile.mark.exists()


@pytest.mark.slow
def test_hostile_context_runs_nothing(world, tmp_path):
    """NeMo would import and call what the context names; here a name is only a name."""
    mark = tmp_path / "mark"
    objects = dict(CONTEXT["objects"])
    objects |= _object("LlamaModel", [["Attr(name='config')", {"type": "ref", "key": "system_1"}]])
    objects |= _object("system", [["Attr(name='command')", {"type": "leaf", "value": f"touch {mark}"}]], "os")
    model = checkpoint(tmp_path / "model", b"", {**CONTEXT, "objects": objects})
    done = minitron("estimate", model, "--data", world / "corpus.jsonl", "--out", tmp_path / "scores.safetensors")
    refused(done, ".metadata")
    assert not mark.exists()


def test_architectures_in_plans_are_checked(world, tmp_path):
    plan = json.loads((world / "plan.json").read_text())
    plan["keep"]["ffn"]["0"][0] = 96
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = minitron("prune", world / "teacher", tmp_path / "plan.json", tmp_path / "student")
    refused(done, "ffn of layer 0")
    assert isinstance(from_hf(world / "teacher"), Architecture)


def test_a_nemo_checkpoint_is_cut_into_one_or_refused_before_nemo_is_loaded(world, tmp_path):
    model = checkpoint(tmp_path / "model")
    refused(minitron("prune", model, world / "plan.json", tmp_path / "student"), ".metadata")
    refused(minitron("prune", model, world / "plan.json", model / "student"), "overlaps the teacher's")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("mine")
    refused(minitron("prune", model, world / "plan.json", tmp_path / "mine", "--overwrite"), "already exists")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_a_dry_run_reads_a_nemo_teachers_sizes_and_loads_nothing(world, tmp_path):
    model = checkpoint(tmp_path / "model")
    script = (
        "import sys\nfrom nemo_minitron.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'nemo', 'megatron', 'transformers') if m in sys.modules])"
    )
    arguments = ["compress", world / "recipe.py", f"teacher={model}", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stages: convert, data, estimate" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    refused(minitron(*arguments, "keep.ffn=97"), "ffn=97", "nearest is 96")


def test_two_commands_never_share_a_run_folder(world, tmp_path):
    """Without the lock the second one is refused for what the recipe lacks further on, not for this."""
    run = tmp_path / "run"
    hold = (
        "import sys\nfrom nemo_minitron.launch.lock import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        refused(minitron("compress", world / "recipe.py", "--out", run), "in use by another minitron", str(holder.pid))
        assert [path.name for path in run.iterdir()] == [".lock"]
        holder.stdin.close()


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback_wherever_it_stands(world, tmp_path, where):
    (tmp_path / "mine.py").write_text("def recipe():\n    return {}['a']")
    words = ["compress", tmp_path / "mine.py", "--dry-run"]
    refused(minitron(*words), "fails in line 2: KeyError: 'a'")
    done = minitron(*(["--debug", *words] if where == "before" else [*words, "--debug"]))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "return {}['a']" in done.stderr


def test_a_truncated_tokenizer_is_one_sentence(world, broken):
    file = broken / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:500])
    refused(minitron("evaluate", broken, "--data", world / "corpus.jsonl"), "gives no tokenizer")


def test_evaluate_without_anything_to_measure(world):
    refused(minitron("evaluate", world / "teacher"), "--data, --tasks or both")


def test_a_place_that_the_system_refuses_is_named_in_a_sentence(world):
    """In /proc nothing can be made, whatever the rights; the message was Python's `[Errno 2]`."""
    command = ("estimate", world / "teacher", "--data", world / "corpus.jsonl", "--out", "/proc/nowhere/scores")
    refused(minitron(*command), "minitron: '/proc/nowhere", "could not be read or written: No such file or directory")
