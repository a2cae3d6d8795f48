"""Of a sharded torch_dist checkpoint only the chunks that hold kept rows are read, one at a time."""

import io
import pickle

import numpy as np
import pytest
import torch
from pico import pico_llama, raw_tensors
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune, write_weights
from nemo_minitron.sources import checkpoint as module
from nemo_minitron.sources.bits import as_tensor
from nemo_minitron.sources.mapping import pieces

LAYER = (
    "self_attention.linear_qkv.weight", "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_proj.weight", "mlp.linear_fc1.weight", "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc2.weight",
)  # fmt: skip
OUTSIDE = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")
PARTS = {"linear_qkv.weight": (0, 3), "linear_proj": (1, 3), "fc1.weight": (0, 6), "fc2": (1, 3), "embedding": (0, 3)}
"""Megatron parameter -> dimension and number of chunks, as three tensor-parallel ranks leave them."""


def parameter(source, name):
    """A whole Megatron parameter, of the folder's tensors."""
    found = pieces(name, source.architecture)
    whole = np.zeros([max(p.place[d][1] for p in found) for d in range(len(found[0].place))], np.uint32)
    for piece in found:
        index = tuple(np.arange(a, b) for a, b in piece.box)
        whole[tuple(slice(a, b) for a, b in piece.place)] = source.read(piece.tensor, index)
    return as_tensor(whole, "F32")


WITH_STATE = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def fp8_state(layer):
    """What Transformer Engine 2 keeps of a linear in `_extra_state`: a pickle of its scales and histories, as bytes."""
    state = {"recipe": None, "scale_fwd": torch.full((3,), 2.0), "amax_history_fwd": torch.ones(1024, 3) * layer}
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def write_checkpoint(source, weights):
    """Layers stacked, each layer's chunks apart, one after another in one file; and Transformer Engine's FP8 state,
    an object a layer, as Megatron writes it: `KEY/shard_OFFSETS_SHAPE`, bytes of torch.save."""
    entries, places, data = {}, {}, io.BytesIO()

    def add(key, offset, chunk, size):
        entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), []))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(chunk.shape)))
        start = data.tell()
        torch.save(chunk.clone(), data)
        info = _StorageInfo("__0_0.distcp", start, data.tell() - start)
        places[MetadataIndex(key, torch.Size(offset))] = info

    def split(key, tensor, stacked, size):
        dim, count = next((part for end, part in PARTS.items() if end in key), (0, 1))
        at = 0
        for chunk in tensor.tensor_split(count, dim):
            offset = [*stacked, *(at if d == dim else 0 for d in range(tensor.dim()))]
            add(key, offset, chunk.reshape([1] * len(stacked) + list(chunk.shape)), size)
            at += chunk.shape[dim]

    for name in OUTSIDE:
        tensor = parameter(source, name)
        split(f"module.{name}", tensor, (), tensor.shape)
    layers = source.architecture.num_layers
    for name in LAYER:
        for layer in range(layers):
            tensor = parameter(source, f"decoder.layers.{layer}.{name}")
            split(f"module.decoder.layers.{name}", tensor, (layer,), (layers, *tensor.shape))
    for name in WITH_STATE:
        for layer in range(layers):
            key, start = f"module.decoder.layers.{name}._extra_state/shard_{layer}_{layers}", data.tell()
            torch.save(fp8_state(layer), data)
            entries[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", start, data.tell() - start)
    weights.mkdir(parents=True)
    (weights / "__0_0.distcp").write_bytes(data.getvalue())
    (weights / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, places)))


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """(folder, the same as a CheckpointSource, the chunks that it reads: (key, offsets, bytes))."""
    folder = pico_llama(tmp_path / "t")
    source = HFSource(folder)
    write_checkpoint(source, tmp_path / "nemo" / "weights")
    monkeypatch.setattr(module, "hf_config", lambda path: dict(source.config))  # the context is another test's
    monkeypatch.setattr(module, "tokenizer_folder", lambda path: folder)
    found, read = [], module.CheckpointSource._read_chunk

    def noted(self, key, chunk):
        before = self._chunk
        data = read(self, key, chunk)
        if self._chunk is not before:
            found.append((key, tuple(chunk.offsets), data.numel() * 4))
        return data

    monkeypatch.setattr(module.CheckpointSource, "_read_chunk", noted)
    return folder, module.CheckpointSource(tmp_path / "nemo"), found


def test_chunks_that_are_read(tmp_path, teacher):
    """Two layers of six; neurons of the first third; heads of the first and last group; all else is left alone."""
    folder, checkpoint, found = teacher
    source = from_hf(folder)
    keep = {
        "layers": [1, 4], "ffn": {n: [0, 5, 31] for n in (1, 4)}, "query_groups": {n: [0, 2] for n in (1, 4)},
        "heads": {n: [0, 1, 4, 5] for n in (1, 4)},
    }  # fmt: skip
    target = source.replace(num_layers=2, ffn_hidden_size=3, num_query_groups=2, num_attention_heads=4)
    plan = PrunePlan(source=source, target=target, keep=keep)
    (tmp_path / "s").mkdir()
    write_weights(checkpoint, plan, tmp_path / "s", checkpoint.config)
    ours, theirs = raw_tensors(tmp_path / "s"), raw_tensors(prune(folder, plan, tmp_path / "by-folder"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    wanted = {(f"module.{name}", ()): 1 for name in OUTSIDE[1:]}
    read = {(key.removeprefix("module.decoder.layers."), at) for key, at, _ in found if ".layers." in key}
    assert {at[0] for _, at in read} == {1, 4}
    assert {at[1:] for key, at in read if key.endswith("linear_qkv.weight")} == {(0, 0), (64, 0)}  # of 3 groups of 32
    assert {at[1:] for key, at in read if "linear_proj" in key} == {(0, 0), (0, 32)}
    assert {at[1:] for key, at in read if key.endswith("fc1.weight")} == {(0, 0), (96, 0)}  # of gate and of up
    assert {at[1:] for key, at in read if "fc2" in key} == {(0, 0)}
    outside = [(key, at) for key, at, _ in found if ".layers." not in key]
    assert len(outside) == len(set(outside)) == 3 + len(wanted)  # the embedding's three chunks, each once


def test_fp8_state_is_left_behind(tmp_path, teacher):
    """A cut matrix has other largest magnitudes: scales and histories are neither read (a pickle, in torch's own
    loader too) nor written, and Transformer Engine starts its history anew."""
    _, checkpoint, found = teacher
    state = [key for key in checkpoint._metadata.state_dict_metadata if "_extra_state" in key]
    assert len(state) == len(WITH_STATE) * checkpoint.architecture.num_layers
    plan = PrunePlan(source=checkpoint.architecture, target=checkpoint.architecture, keep={})
    (tmp_path / "s").mkdir()
    write_weights(checkpoint, plan, tmp_path / "s", checkpoint.config)
    assert not [key for key, _, _ in found if "_extra_state" in key]
    assert not [name for name in raw_tensors(tmp_path / "s") if "extra" in name]


def test_how_often_a_chunk_is_read(tmp_path, teacher):
    """A whole copy reads a chunk once for each of q, k, v that it holds, and every other chunk once; one is held."""
    folder, checkpoint, found = teacher
    identity = PrunePlan(source=checkpoint.architecture, target=checkpoint.architecture, keep={})
    (tmp_path / "s").mkdir()
    write_weights(checkpoint, identity, tmp_path / "s", checkpoint.config)
    times = {place: sum(other[:2] == place for other in found) for place in {row[:2] for row in found}}
    assert {n for (key, _), n in times.items() if key.endswith("linear_qkv.weight")} == {3}
    assert {n for (key, _), n in times.items() if not key.endswith("linear_qkv.weight")} == {1}
    key, data = checkpoint._chunk
    assert isinstance(key, MetadataIndex)
    assert data.numel() * 4 <= max(row[2] for row in found)
    ours, theirs = raw_tensors(tmp_path / "s"), raw_tensors(folder)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_identity_is_read_once_and_nothing_of_it_stays(teacher):
    """A job keeps its teacher open to its end. Mutation: a `digest` that does not `rest`."""
    folder, checkpoint, found = teacher
    assert checkpoint.identity == HFSource(folder).identity
    assert checkpoint._chunk is None
    count = len(found)
    assert checkpoint.identity == [checkpoint.digest, checkpoint.identity[1]]
    assert len(found) == count > 0
