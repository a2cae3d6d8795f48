"""A torch_dist checkpoint that lies: about its sizes, its dtypes, what its chunks become, what its pickles are."""

import io
import os
import pickle
import zipfile

import mutations_of_files as mutations
import numpy as np
import pytest
import torch
from pico import pico_llama
from test_checkpoint_chunks import write_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from nemo_minitron.data.index_file import check_arrays
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import HFSource
from nemo_minitron.sources import checkpoint as module
from nemo_minitron.sources.checkpoint_files import check_resumable, read_metadata

NORM = "module.decoder.final_layernorm.weight"


@pytest.fixture
def weights(tmp_path):
    """A whole checkpoint of a small model, as `LAST/weights`."""
    write_checkpoint(HFSource(pico_llama(tmp_path / "t")), tmp_path / "nemo" / "last" / "weights")
    return tmp_path / "nemo" / "last" / "weights"


@pytest.fixture
def read(weights, monkeypatch):
    """Opens it and reads the final norm."""
    folder = weights.parents[2] / "t"
    monkeypatch.setattr(module, "hf_config", lambda path: dict(HFSource(folder).config))
    monkeypatch.setattr(module, "tokenizer_folder", lambda path: folder)

    def norm():
        source = module.CheckpointSource(weights.parent)
        return source.read("final_norm.weight", (np.arange(48),))

    return norm


def change(weights, how):
    """The metadata, changed by `how(entry, metadata)` of the final norm."""
    metadata = read_metadata(weights)
    how(metadata.state_dict_metadata[NORM], metadata)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_chunk(weights, data):
    """The final norm's chunk is these bytes, in a file of their own."""
    (weights / "own.distcp").write_bytes(data)

    def point(entry, metadata):
        index = MetadataIndex(NORM, entry.chunks[0].offsets)
        metadata.storage_data[index] = _StorageInfo("own.distcp", 0, len(data))

    change(weights, point)


def saved(value, compression=zipfile.ZIP_STORED):
    """As torch.save, its records compressed on request."""
    data = io.BytesIO()
    torch.save(value, data)
    if compression == zipfile.ZIP_STORED:
        return data.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(data) as stored, zipfile.ZipFile(packed, "w", compression) as archive:
        for entry in stored.infolist():
            archive.writestr(entry.filename, stored.read(entry))
    return packed.getvalue()


def test_a_whole_one(weights, read):
    assert len(read()) == 48
    check_resumable(weights.parents[1])


def sizes(value):
    def how(entry, metadata):
        entry.chunks[0].sizes = torch.Size(value)
        entry.size = torch.Size(value)

    return how


def dtype(entry, metadata):
    entry.properties.dtype = torch.float64


def outside(entry, metadata):
    entry.chunks[0].sizes = torch.Size([49])


def place(**fields):
    def how(entry, metadata):
        info = metadata.storage_data[MetadataIndex(NORM, entry.chunks[0].offsets)]
        for name, value in fields.items():
            object.__setattr__(info, name, value)

    return how


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (sizes([10**15]), "numbers in .* bytes"),
        (sizes([2**61]), "numbers in .* bytes"),
        (outside, "lies outside it"),
        (place(length=10**15), "names bytes that '__0_0.distcp' does not have"),
        (place(offset=10**15), "names bytes"),
        (place(offset=-1), "names bytes"),
        (place(relative_path="../../../t/config.json"), "points outside its own folder"),
        (place(relative_path="nothing.distcp"), "does not have"),
        (place(transform_descriptors=["zstd"]), "holds compressed chunks"),
    ],
)
def test_metadata_that_lies_is_refused_before_a_chunk_is_read(weights, how, words):
    change(weights, how)
    with pytest.raises(InputError, match=words):
        read_metadata(weights)


@pytest.mark.parametrize(
    ("value", "compression", "words"),
    [
        (torch.ones(48, dtype=torch.float64), zipfile.ZIP_STORED, "numbers of torch.float64; its .metadata says 48 of"),
        (torch.ones(24), zipfile.ZIP_STORED, "24 numbers of torch.float32; its .metadata says 48"),
        (torch.ones(1).expand(10**12), zipfile.ZIP_STORED, "1000000000000 numbers"),
        (torch.zeros(1 << 24), zipfile.ZIP_DEFLATED, "it would take .* bytes in the place of 192"),
        ({"a": torch.ones(48)}, zipfile.ZIP_STORED, "not a plain tensor"),
        (torch.ones(48).to_sparse(), zipfile.ZIP_STORED, "not a plain tensor"),
    ],
)  # fmt: skip
def test_chunks_that_are_not_what_the_metadata_says(weights, read, value, compression, words):
    replace_chunk(weights, saved(value, compression))
    with pytest.raises(InputError, match=words):
        read()


def test_a_chunk_that_is_a_pickle_is_not_loaded(weights, read, tmp_path):
    replace_chunk(weights, saved(mutations.Trap(str(tmp_path / "ran"))) + bytes(192))
    with pytest.raises(InputError, match="cannot be read"):
        read()
    assert not (tmp_path / "ran").exists()


def hostile_metadata(weights, trap):
    change(weights, lambda entry, metadata: setattr(metadata, "planner_data", trap))


def hostile_common(weights, trap):
    (weights / "common.pt").write_bytes(saved({"loops": trap}))


def hostile_object(weights, trap):
    data = saved(trap)
    (weights / "own.distcp").write_bytes(data)

    def add(entry, metadata):
        metadata.state_dict_metadata["optimizer.step"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("optimizer.step")] = _StorageInfo("own.distcp", 0, len(data))

    change(weights, add)


@pytest.mark.parametrize("plant", [hostile_metadata, hostile_common, hostile_object])
def test_a_training_does_not_go_on_from_a_pickle_that_runs_code(weights, tmp_path, plant):
    plant(weights, mutations.Trap(str(tmp_path / "ran")))
    with pytest.raises(InputError):
        check_resumable(weights.parents[1])
    assert not (tmp_path / "ran").exists()


def test_an_index_of_samples_that_is_a_pickle_is_not_loaded(tmp_path):
    np.save(tmp_path / "good.npy", np.arange(5))
    (tmp_path / "begun.npy").write_bytes(b"\x93NU")
    check_arrays(tmp_path)
    (tmp_path / "bad.npy").write_bytes(pickle.dumps(mutations.Trap(str(tmp_path / "ran"))))
    with pytest.raises(InputError, match=r"bad\.npy' is not an array"):
        check_arrays(tmp_path)


def test_damaged_metadata_and_chunks(weights, read):
    """Bytes of `.metadata`, and of the chunk of a norm."""
    file, chunk = weights / ".metadata", saved(torch.ones(48))
    replace_chunk(weights, chunk)
    whole, refused = file.read_bytes(), []
    for data in mutations.of_bytes(whole, 150, seed="metadata"):
        file.write_bytes(data)
        mutations.tries(read_metadata, weights, refused)
    file.write_bytes(whole)
    for data in mutations.of_bytes(chunk, 60, seed="chunk"):
        (weights / "own.distcp").write_bytes(data)
        mutations.tries(lambda _: read(), weights, refused)
    assert len(refused) > 50
    assert all(len(message) < 2000 and message.isprintable() for message in refused)


def test_the_trap_would_snap(tmp_path):
    """What the tests above plant does run when torch's unsafe loader meets it."""
    torch.load(io.BytesIO(saved(mutations.Trap(str(tmp_path / "ran")))), weights_only=False)
    assert os.path.isdir(tmp_path / "ran")
