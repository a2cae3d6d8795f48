"""Folder to folder: exact bytes, exact logits, and what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from pico import pico_llama, pico_mistral, raw_tensors, save_tensors
from plans_by_hand import slice_by_hand, whole_groups, width_and_depth
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.sources.tensors import source_digest


def identity(source):
    return PrunePlan(source=source, target=source, keep={})


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_identity_is_byte_identical(tmp_path, dtype, tied):
    teacher = pico_llama(tmp_path / "t", dtype=dtype, tie_word_embeddings=tied)
    student = prune(teacher, identity(from_hf(teacher)), tmp_path / "s")
    assert student == tmp_path / "s"
    assert_equal(raw_tensors(student), raw_tensors(teacher))
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (student, teacher))
    assert {name: ours[name] for name in theirs} == theirs
    rope = {"rope_type": "default", "rope_theta": 5000.0}  # for transformers 5, beside what transformers 4 reads
    assert {n: ours[n] for n in ours.keys() - theirs.keys()} == {"rope_parameters": rope, "torch_dtype": dtype}


@pytest.mark.parametrize("cut", [width_and_depth, whole_groups])
@pytest.mark.parametrize("make", [pico_llama, pico_mistral])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cut_is_slicing_by_hand(tmp_path, cut, make, dtype):
    teacher = make(tmp_path / "t", dtype=dtype)
    plan = cut(from_hf(teacher))
    student = prune(teacher, plan, tmp_path / "s")
    assert_equal(raw_tensors(student), slice_by_hand(raw_tensors(teacher), plan))
    assert from_hf(student) == plan.target
    assert PrunePlan.load(student / "minitron_plan.json") == plan


def test_biases_are_cut_too(tmp_path):
    teacher = pico_llama(tmp_path / "t", attention_bias=True, mlp_bias=True)
    plan = width_and_depth(from_hf(teacher))
    student = prune(teacher, plan, tmp_path / "s")
    assert_equal(raw_tensors(student), slice_by_hand(raw_tensors(teacher), plan))


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_was_sliced_by_hand(tmp_path, tied):
    """The student in transformers is the model into which the hand-sliced state dict was put."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    teacher = pico_llama(tmp_path / "t", tie_word_embeddings=tied)
    plan = width_and_depth(from_hf(teacher))
    student = prune(teacher, plan, tmp_path / "s")
    model, report = AutoModelForCausalLM.from_pretrained(student, output_loading_info=True)
    assert not any(report.values()), report
    config = AutoConfig.from_pretrained(student)
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (3, 41, 8)
    by_hand = AutoModelForCausalLM.from_config(config)
    sliced = slice_by_hand(raw_tensors(teacher), plan)
    state = {name: torch.from_numpy(array.view(np.float32).copy()) for name, array in sliced.items()}
    by_hand.load_state_dict(state, strict=not tied)
    tokens = torch.arange(3, 35)[None] * 13 % 509
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, by_hand(tokens).logits)


@pytest.mark.parametrize("make", [pico_llama, pico_mistral])
def test_zero_units_go_without_changing_logits(tmp_path, make):
    """Neurons, heads and a query group that write nothing are exact cuts (P1, section 2)."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = make(tmp_path / "t")
    source = from_hf(teacher)
    ffn = {layer: [i for i in range(96) if (i + layer) % 5] for layer in range(6)}
    size = min(map(len, ffn.values()))
    ffn = {layer: kept[:size] for layer, kept in ffn.items()}
    heads, groups = ({n: list(kept) for n in range(6)} for kept in ([0, 1, 4, 5], [0, 2]))
    tensors = {n: t.view(np.float32) for n, t in raw_tensors(teacher).items()}
    for layer in range(6):
        gone = sorted(set(range(96)) - set(ffn[layer]))
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, gone] = 0
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:, 16:32] = 0
    save_tensors(teacher, tensors)
    target = source.replace(ffn_hidden_size=size, num_attention_heads=4, num_query_groups=2)
    plan = PrunePlan(source=source, target=target, keep={"ffn": ffn, "heads": heads, "query_groups": groups})
    student = prune(teacher, plan, tmp_path / "s")
    tokens = torch.arange(3, 131)[None] * 13 % 509
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(f)(tokens).logits for f in (teacher, student))
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=LOGITS_PICO_FP32)


@pytest.mark.parametrize("shards", [2, 7])
def test_sharded_in_and_out(tmp_path, shards):
    teacher = pico_llama(tmp_path / "t")
    plan = width_and_depth(from_hf(teacher))
    single = raw_tensors(prune(teacher, plan, tmp_path / "single"))
    save_tensors(teacher, {n: t.view(np.float32) for n, t in raw_tensors(teacher).items()}, shards=shards)
    assert not (teacher / "model.safetensors").exists()
    student = prune(teacher, plan, tmp_path / "s", shard_size=40_000)
    assert_equal(raw_tensors(student), single)
    index = json.loads((student / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in student.glob("*.safetensors"))
    assert files == [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == single.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in single.values())
    assert_equal(raw_tensors(prune(student, identity(plan.target), tmp_path / "again")), single)


def test_files_of_the_student(tmp_path):
    teacher = pico_llama(tmp_path / "t")
    copied = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat.jinja", "vocab.json", "LICENSE"]
    left = ["README.md", "pytorch_model.bin", "old.gguf", "a.log", "x.index.json", "minitron_plan.json"]
    for name in copied + left:
        (teacher / name).write_text(name)
    (teacher / "original.json").mkdir()
    student = prune(teacher, identity(from_hf(teacher)), tmp_path / "deep" / "s")
    expected = {*copied, "config.json", "generation_config.json", "model.safetensors", "minitron_plan.json"}
    assert {file.name for file in student.iterdir()} == expected
    for name in copied:
        assert (student / name).read_text() == name
    assert (student / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_plan_as_a_file(tmp_path):
    teacher = pico_llama(tmp_path / "t")
    width_and_depth(from_hf(teacher)).save(tmp_path / "plan.json")
    assert from_hf(prune(teacher, tmp_path / "plan.json", tmp_path / "s")).hidden_size == 41


def test_plan_of_another_model(tmp_path):
    teacher, other = pico_llama(tmp_path / "t"), pico_llama(tmp_path / "o", seed=1)
    plan = width_and_depth(from_hf(teacher))
    wider = width_and_depth(from_hf(teacher).replace(vocab_size=510))
    with pytest.raises(InputError, match=r"its vocab_size is 510, that of '.*' is 509"):
        prune(teacher, wider, tmp_path / "s")
    plan.model_digest = source_digest(HFSource(teacher))
    prune(teacher, plan, tmp_path / "s")
    with pytest.raises(InputError, match="made for another model"):
        prune(other, plan, tmp_path / "s2")
    assert not (tmp_path / "s2").exists()


def test_digest_of_a_stored_dtype(tmp_path):
    """A digest made from fp32 weights holds for the same weights in bf16, and sees other weights."""
    wide, narrow = pico_llama(tmp_path / "w"), pico_llama(tmp_path / "n", dtype="bfloat16")
    other = pico_llama(tmp_path / "o", seed=1)
    assert source_digest(HFSource(wide)) == source_digest(HFSource(narrow)) != source_digest(HFSource(other))


def test_places_that_are_refused(tmp_path):
    teacher = pico_llama(tmp_path / "a" / "t")
    plan = identity(from_hf(teacher))
    (tmp_path / "link").symlink_to(teacher)
    for place in (teacher, teacher / "s", tmp_path / "a", tmp_path / "link", tmp_path / "link" / "s"):
        with pytest.raises(InputError, match="overlaps"):
            prune(teacher, plan, place, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        prune(teacher, plan, tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="could not be written"):
        prune(teacher, plan, tmp_path / "file" / "s")
    (tmp_path / "home").mkdir()
    prune(teacher, plan, tmp_path / "home")  # empty: fine
    with pytest.raises(InputError, match="not empty"):
        prune(teacher, plan, tmp_path / "home")
    prune(teacher, plan, tmp_path / "home", overwrite=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letters").write_text("x")
    with pytest.raises(InputError, match="no model folder"):
        prune(teacher, plan, tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "letters").read_text() == "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_stopped_in_the_middle(tmp_path, monkeypatch, error):
    """What stood there before still stands, and nothing else is left."""
    teacher = pico_llama(tmp_path / "t")
    old = prune(teacher, identity(from_hf(teacher)), tmp_path / "s")
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    read, calls = HFSource.read, []

    def stop_at_the_tenth(self, name, index):
        calls.append(name)
        if len(calls) == 10:
            raise error
        return read(self, name, index)

    monkeypatch.setattr(HFSource, "read", stop_at_the_tenth)
    for place, options in ((old, {"overwrite": True}), (tmp_path / "new", {})):
        calls.clear()
        with pytest.raises((KeyboardInterrupt, InputError)):
            prune(teacher, width_and_depth(from_hf(teacher)), place, **options)
        assert len(calls) >= 10
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "t"]


@pytest.mark.parametrize("before", [True, False])
def test_killed_in_the_middle(tmp_path, before):
    """SIGKILL while weights are written: the old student, byte for byte, or none; the next cut is not disturbed."""
    teacher, student = pico_llama(tmp_path / "t"), tmp_path / "s"
    if before:
        prune(teacher, identity(from_hf(teacher)), student)
    old = {file.name: file.read_bytes() for file in student.glob("*")}
    width_and_depth(from_hf(teacher)).save(tmp_path / "plan.json")
    code = f"""
import os, signal
from nemo_minitron.pruning import HFSource, prune
read, calls = HFSource.read, []
def kill_at_the_last(self, name, index):
    calls.append(name)
    if name == "layers.5.down.weight" and len(index[1]) == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, name, index)
HFSource.read = kill_at_the_last
prune({str(teacher)!r}, {str(tmp_path / "plan.json")!r}, {str(student)!r}, overwrite=True)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert {file.name: file.read_bytes() for file in student.glob("*")} == old
    assert student.exists() == before
    prune(teacher, tmp_path / "plan.json", student, overwrite=True)
    assert from_hf(student).hidden_size == 41


def test_full_disk_is_told_before_the_first_byte(tmp_path, monkeypatch):
    import collections
    import shutil

    teacher = pico_llama(tmp_path / "t")
    usage = collections.namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs .* GB"):
        prune(teacher, identity(from_hf(teacher)), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_no_model_library_is_loaded(tmp_path):
    teacher = pico_llama(tmp_path / "t", dtype="bfloat16")
    teacher, student = str(teacher), str(tmp_path / "s")
    code = f"""
import sys
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan
prune({teacher!r}, random_plan(from_hf({teacher!r}), dict(ffn=64, layers=4)), {student!r})
heavy = {{'torch', 'transformers', 'nemo', 'megatron', 'lightning', 'safetensors'}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert from_hf(tmp_path / "s").num_layers == 4
