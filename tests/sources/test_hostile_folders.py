"""Damaged and lying files: one sentence each, no code run, no memory taken."""

import json
import pickle
import struct

import pytest
from mutations_of_files import Trap
from pico import pico_llama, save_tensors
from test_hf_source import floats

from nemo_minitron.errors import InputError
from nemo_minitron.pruning import HFSource
from nemo_minitron.sources.headers import LARGEST, read_header

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(file, header, data=32, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return file


def changed(name="b", **fields):
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_a_good_file(tmp_path):
    entries = read_header(write(tmp_path / "f", {"__metadata__": {"format": "pt"}, **GOOD}))
    assert list(entries) == ["a", "b"]
    assert entries["b"].start == (tmp_path / "f").stat().st_size - 8
    assert (entries["a"].shape, entries["a"].size, entries["a"].dtype) == ((2, 3), 24, "F32")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not JSON"),
        (b"not json", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": 1, "a": 1}', "a name occurs twice"),
        ({"a": 3}, "no dtype, shape and offsets"),
        ({"a": {}}, "unknown dtype None"),
        (changed(dtype="F31"), "unknown dtype 'F31'"),
        (changed(dtype=["F32"]), "unknown dtype"),
        (changed(shape=[-4]), "illegal shape"),
        (changed(shape=[4.0]), "illegal shape"),
        (changed(shape="4"), "illegal shape"),
        (changed(shape=[True, 4]), "illegal shape"),
        (changed(data_offsets=[24]), "illegal offsets"),
        (changed(data_offsets=[24, -32]), "illegal offsets"),
        (changed(data_offsets=None), "illegal shape or illegal offsets"),
        (changed(shape=[5]), "takes 8 bytes"),
        (changed(dtype="F32"), "takes 8 bytes"),
        (changed(shape=[2**62, 2**62]), "takes 8 bytes"),
        (changed(data_offsets=[32, 24]), "takes -8 bytes"),
        (changed(data_offsets=[16, 24]), "overlaps"),
        (changed(data_offsets=[0, 8]), "overlaps"),
        (changed(data_offsets=[32, 40]), "hole"),
        (changed(data_offsets=[2**60, 2**60 + 8]), "hole"),
        (changed(shape=[8], data_offsets=[24, 40]), "describes .* bytes, the file has"),
        ({"a": GOOD["a"]}, "describes .* bytes, the file has"),
    ],
)
def test_lying_headers(tmp_path, header, message):
    with pytest.raises(InputError, match=message) as caught:
        read_header(write(tmp_path / "f", header))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, LARGEST + 1])
def test_huge_header_takes_no_memory(tmp_path, length):
    with pytest.raises(InputError, match="header should take"):
        read_header(write(tmp_path / "f", GOOD, length=length))


def test_header_above_the_formats_limit(tmp_path):
    """A sparse file is long enough for the header that it promises; it is refused by the limit alone."""
    file = write(tmp_path / "f", GOOD, length=LARGEST + 1)
    with open(file, "r+b") as stream:
        stream.truncate(2 * LARGEST)
    with pytest.raises(InputError, match="header should take"):
        read_header(file)


def test_every_truncation_is_told(tmp_path):
    whole = write(tmp_path / "f", GOOD).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a complete safetensors file"):
            read_header(tmp_path / "f")


def test_truncated_model(tmp_path):
    folder = pico_llama(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="is the download complete"):
        HFSource(folder)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path)


def test_the_trap_snaps(tmp_path):
    pickle.loads(pickle.dumps(Trap(str(tmp_path / "ran"))))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_not_loaded(tmp_path, name):
    folder = pico_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    with pytest.raises(InputError, match=f"only as a pickle.*{name}.*save it as safetensors"):
        HFSource(folder)
    assert not (tmp_path / "ran").exists()


def test_no_weights(tmp_path):
    folder = pico_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        HFSource(folder)


def test_missing_shard(tmp_path):
    folder = pico_llama(tmp_path)
    save_tensors(folder, floats(folder), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks the shard 'model-00002-of-00003\.safetensors'"):
        HFSource(folder)


def test_index_that_promises_what_a_shard_has_not(tmp_path):
    folder = pico_llama(tmp_path)
    save_tensors(folder, floats(folder), shards=2)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    moved = next(name for name, shard in index["weight_map"].items() if shard.startswith("model-00002"))
    index["weight_map"][moved] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match="that the index puts there"):
        HFSource(folder)


def test_tensor_in_two_shards(tmp_path):
    folder = pico_llama(tmp_path)
    tensors = floats(folder)
    save_tensors(folder, tensors, shards=2)
    from safetensors.numpy import save_file

    first = [name for name, shard in _map(folder).items() if shard.startswith("model-00001")]
    other = next(name for name in tensors if name not in first)
    save_file({n: tensors[n] for n in [*first, other]}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match="in two shards"):
        HFSource(folder)


def _map(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("place", ["../x", "/etc/passwd", "..", "", "a/b", "a\\b", "a\0b", 3, None, ["x"]])
def test_index_that_points_elsewhere(tmp_path, place):
    folder = pico_llama(tmp_path / "t")
    (folder / "model.safetensors").rename(tmp_path / "x")
    index = {"weight_map": {"lm_head.weight": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no file beside it"):
        HFSource(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x00"])
def test_index_that_is_none(tmp_path, text):
    folder = pico_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="the index"):
        HFSource(folder)


@pytest.mark.parametrize("size", ["NaN", "Infinity", "1e3", '"48"', "-48", "null", "[48]"])
def test_config_sizes(tmp_path, size):
    folder = pico_llama(tmp_path)
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"hidden_size": 48', f'"hidden_size": {size}'))
    with pytest.raises(InputError, match="hidden_size"):
        HFSource(folder)
