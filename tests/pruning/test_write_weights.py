"""The writer: constant memory, aligned elements, several threads, another source than a folder."""

import threading

import numpy as np
import pytest
from pico import pico_llama, raw_tensors, save_tensors
from plans_by_hand import slice_by_hand, width_and_depth

from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, write_weights
from nemo_minitron.sources import folder as module
from nemo_minitron.sources.headers import SIZES, read_header


class Watched(HFSource):
    """Notes the bytes of rows that each read takes, and the threads that read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.sizes, self.threads = [], set()

    def read(self, name, index):
        width = np.prod(self.architecture.shapes()[name][1:], dtype=int)
        self.sizes.append(len(index[0]) * width * SIZES[self.dtype(name)])
        self.threads.add(threading.get_ident())
        return super().read(name, index)


class Whole:
    """A source that has nothing but what every source must have."""

    def __init__(self, source):
        self.architecture, self.dtype, self.read = source.architecture, source.dtype, source.read


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_are_bounded_and_join(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(module, "BLOCK", 1000)  # 5 rows of 48 fp32 values
    folder, out = pico_llama(tmp_path / "t"), tmp_path / "s"
    plan, source = width_and_depth(from_hf(folder)), Watched(folder)
    out.mkdir()
    write_weights(source, plan, out, source.config, threads=threads)
    assert max(source.sizes) == 960
    assert len(source.threads) <= threads
    expected = slice_by_hand(raw_tensors(folder), plan)
    found = raw_tensors(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)


def test_a_source_without_streams_is_asked_for_whole_tensors(tmp_path):
    """As chunks of a checkpoint would be read again for each block; and the file is the same."""
    folder = pico_llama(tmp_path / "t")
    source, plan, files = Watched(folder), width_and_depth(from_hf(folder)), []
    for one in (Whole(source), HFSource(folder)):
        out = tmp_path / str(len(files))
        out.mkdir()
        write_weights(one, plan, out, source.config)
        files.append((out / "model.safetensors").read_bytes())
    assert len(source.sizes) == len(raw_tensors(out))
    assert files[0] == files[1]


def test_mixed_dtypes_are_aligned(tmp_path):
    """An odd number of two-byte elements must not push wide ones off their boundary."""
    folder, out = pico_llama(tmp_path / "t"), tmp_path / "s"
    tensors = {n: t.view(np.float32) for n, t in raw_tensors(folder).items()}
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].astype(np.float16)
    save_tensors(folder, tensors)
    out.mkdir()
    source = HFSource(folder)
    write_weights(source, width_and_depth(from_hf(folder)), out, source.config)
    entries = read_header(out / "model.safetensors")
    assert {entry.dtype for entry in entries.values()} == {"F16", "F32"}
    assert all(entry.start % SIZES[entry.dtype] == 0 for entry in entries.values())
    expected = slice_by_hand(raw_tensors(folder), width_and_depth(from_hf(folder)))
    found = raw_tensors(out)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)


def test_same_bytes_whatever_the_threads(tmp_path):
    folder = pico_llama(tmp_path / "t", dtype="bfloat16")
    source, files = HFSource(folder), []
    for threads in (1, 2, 5):
        out = tmp_path / str(threads)
        out.mkdir()
        write_weights(source, width_and_depth(from_hf(folder)), out, source.config, threads=threads)
        files.append((out / "model.safetensors").read_bytes())
    assert len(set(files)) == 1


def test_shards_hold_what_fits(tmp_path):
    folder, out = pico_llama(tmp_path / "t"), tmp_path / "s"
    source = HFSource(folder)
    out.mkdir()
    write_weights(source, width_and_depth(from_hf(folder)), out, source.config, shard_size=20_000)
    for file in out.glob("*.safetensors"):
        entries = read_header(file).values()
        assert sum(entry.size for entry in entries) <= 20_000 or len(entries) == 1
    assert len(list(out.glob("*.safetensors"))) < 31  # and not one each
