"""Reading blocks of a Hugging Face folder; fused tensors; what a folder may lack or have too much."""

import json

import numpy as np
import pytest
from pico import pico_llama, raw_tensors, save_tensors
from plans_by_hand import slice_by_hand, width_and_depth

import nemo_minitron.families
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.families.llama import Llama
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.sources.tensors import whole


def floats(folder):
    return {name: tensor.view(np.float32) for name, tensor in raw_tensors(folder).items()}


def set_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks(tmp_path, dtype):
    folder = pico_llama(tmp_path, dtype=dtype)
    source, raw = HFSource(folder), raw_tensors(folder)
    generator = np.random.default_rng(0)
    names = source.family.hf_tensors(source.architecture)
    for hf_name, (name,) in names.items():
        expected = raw[hf_name]
        assert source.dtype(name) == {"float32": "F32", "bfloat16": "BF16"}[dtype]
        np.testing.assert_array_equal(source.read(name, whole(expected.shape)), expected, strict=True)
        for share in (0.1, 0.9):
            index = tuple(np.flatnonzero(generator.random(n) < share) for n in expected.shape)
            np.testing.assert_array_equal(source.read(name, index), expected[np.ix_(*index)], strict=True)
    rows = np.arange(0)
    assert source.read("layers.0.q.weight", (rows, np.arange(48))).shape == (0, 48)


def test_rows_out_of_range(tmp_path):
    source = HFSource(pico_llama(tmp_path))
    for rows in ([-1, 0], [47, 48]):
        with pytest.raises(IndexError):
            source.read("layers.0.q.weight", (np.array(rows), np.arange(48)))
        with pytest.raises(IndexError):
            source.read("layers.0.q.weight", (np.arange(48), np.array(rows)))
    with pytest.raises(InputError, match="no tensor"):
        source.read("layers.6.q.weight", whole((48, 48)))


def test_gaps_and_calls_that_end_early(tmp_path, monkeypatch):
    """Runs of rows over short gaps, over long ones, more runs than one call takes, and calls that read too little."""
    from nemo_minitron.sources import rows as module

    folder = pico_llama(tmp_path)
    expected = raw_tensors(folder)["model.embed_tokens.weight"]
    generator = np.random.default_rng(0)
    rows = np.flatnonzero(generator.random(509) < 0.5)
    rows = rows[(rows < 100) | (rows > 400)]
    whole_call = module.os.preadv

    def short(handle, views, position):
        size = max(1, sum(map(len, views)) // 3)
        taken = []
        for view in views:
            taken.append(view[: size - sum(map(len, taken))])
        return whole_call(handle, taken, position)

    for gap, most, call in ((64 << 10, 1024, whole_call), (400, 1024, whole_call), (64 << 10, 7, short)):
        monkeypatch.setattr(module, "_GAP", memoryview(bytearray(gap)))
        monkeypatch.setattr(module, "MOST", most)
        monkeypatch.setattr(module.os, "preadv", call)
        found = HFSource(folder).read("embedding.weight", (rows, np.arange(48)))
        np.testing.assert_array_equal(found, expected[rows], strict=True)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    source = HFSource(pico_llama(tmp_path))
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    last = max(source.architecture.shapes(), key=lambda name: source._places[name][0].start)
    with pytest.raises(InputError, match="ends at byte"):
        source.read(last, whole(source.architecture.shapes()[last]))


def test_tied_head_in_the_file_is_ignored(tmp_path):
    folder = pico_llama(tmp_path / "t", tie_word_embeddings=True)
    tensors = floats(folder)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_tensors(folder, tensors)
    plan = width_and_depth(from_hf(folder))
    assert "lm_head.weight" not in raw_tensors(prune(folder, plan, tmp_path / "s"))


def test_tensors_without_weights_are_ignored(tmp_path):
    folder = pico_llama(tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(4.0)}
    save_tensors(folder, floats(folder) | extra)
    HFSource(folder)


def test_what_nothing_claims(tmp_path):
    folder = pico_llama(tmp_path)
    save_tensors(folder, floats(folder) | {"model.layers.0.extra.weight": np.zeros(3)})
    with pytest.raises(InputError, match=r"tensor 'model\.layers\.0\.extra\.weight'"):
        HFSource(folder)
    save_tensors(pico_llama(tmp_path), floats(folder))
    set_config(folder, num_hidden_layers=5)
    with pytest.raises(InputError, match=r"tensor 'model\.layers\.5\."):
        HFSource(folder)


def test_what_is_missing(tmp_path):
    folder = pico_llama(tmp_path)
    tensors = floats(folder)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_tensors(folder, tensors)
    with pytest.raises(InputError, match=r"lacks the tensor 'model\.layers\.3\.mlp\.up_proj\.weight'"):
        HFSource(folder)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"hidden_size": 49}, "embed_tokens"),
        ({"vocab_size": 512}, "embed_tokens"),
        ({"intermediate_size": 95}, "gate_proj"),
        ({"num_key_value_heads": 6}, "k_proj"),
        ({"head_dim": 4}, "q_proj"),
    ],
)
def test_config_that_contradicts_the_shapes(tmp_path, fields, name):
    folder = pico_llama(tmp_path)
    set_config(folder, **fields)
    with pytest.raises(InputError, match=rf"{name}.* is \(.*\); its config says \("):
        HFSource(folder)


@pytest.mark.parametrize(
    ("layers", "words"),
    [(10_000, "10000 layers, its files hold 57 tensors"), (10**12, "is 1000000000000; legal are 1 to 10000")],
)
def test_config_of_a_billion_layers_costs_nothing(tmp_path, layers, words):
    folder = pico_llama(tmp_path)
    set_config(folder, num_hidden_layers=layers)
    with pytest.raises(InputError, match=words):
        HFSource(folder)


def test_quantised_weights(tmp_path):
    folder = pico_llama(tmp_path)
    tensors = floats(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    save_tensors(folder, tensors | {name: tensors[name].astype(np.int8)})
    with pytest.raises(InputError, match="stored as I8; legal are BF16, F16, F32, F64"):
        HFSource(folder)


class Fused(Llama):
    """Llama with q, k, v in one tensor and gate, up in another, as Phi-3 stores them."""

    model_type, hf_class = "fused", "FusedForCausalLM"
    tensors = {  # noqa: RUF012
        **{name: parts for name, parts in Llama.tensors.items() if name.split(".")[-2] not in (
            "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")},
        "model.layers.{i}.self_attn.qkv_proj.weight": tuple(f"layers.{{i}}.{n}.weight" for n in "qkv"),
        "model.layers.{i}.mlp.gate_up_proj.weight": ("layers.{i}.gate.weight", "layers.{i}.up.weight"),
    }  # fmt: skip


def fuse(tensors, layers):
    tensors = dict(tensors)
    for i in range(layers):
        for fused, parts in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
            names = [f"model.layers.{i}.{fused.split('.')[0]}.{part}_proj.weight" for part in parts]
            tensors[f"model.layers.{i}.{fused}.weight"] = np.concatenate([tensors.pop(n) for n in names])
    return tensors


def test_fused_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(nemo_minitron.families, "FAMILIES", (Fused(),))
    folder = pico_llama(tmp_path / "t")
    plain = raw_tensors(folder)
    save_tensors(folder, {n: t.view(np.float32) for n, t in fuse(plain, 6).items()})
    set_config(folder, architectures=["FusedForCausalLM"], model_type="fused")
    plan = width_and_depth(from_hf(folder))
    student = raw_tensors(prune(folder, plan, tmp_path / "s"))
    expected = fuse(slice_by_hand(plain, plan), 3)
    assert student.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(student[name], tensor, err_msg=name, strict=True)


def test_fused_tensors_of_two_dtypes(tmp_path, monkeypatch):
    folder = pico_llama(tmp_path / "t")
    tensors = floats(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    save_tensors(folder, tensors | {name: tensors[name].astype(np.float16)})
    plan = width_and_depth(from_hf(folder))
    student = raw_tensors(prune(folder, plan, tmp_path / "s"))  # unfused: each keeps its own
    assert {t.dtype.itemsize for t in student.values()} == {4}  # layer 1 is gone
    from nemo_minitron.pruning.write import write_weights

    monkeypatch.setattr(nemo_minitron.families, "FAMILIES", (Fused(),))
    source = HFSource.__new__(HFSource)
    monkeypatch.setattr(source, "dtype", lambda name: "F16" if "up" in name else "F32", raising=False)
    with pytest.raises(InputError, match=r"gate_up_proj.* stored as F16 and F32"):
        write_weights(source, plan, tmp_path, {"architectures": ["FusedForCausalLM"]})
