"""Whole or not at all; the manifest; the model digest's rounding."""

import ctypes
import errno
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_architecture import smollm2

from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts.digest import model_digest, sample_index
from nemo_minitron.artifacts.dtypes import bf16_bits
from nemo_minitron.artifacts.files import (
    atomic_file,
    atomic_folder,
    digest_of,
    need_space,
    read_json,
    reserve,
    write_json,
)
from nemo_minitron.errors import InputError


def _stopped(block, write):
    with block as temporary:
        write(temporary)
        raise KeyboardInterrupt


def test_file_keeps_the_old_when_stopped(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, 1)
    with pytest.raises(KeyboardInterrupt):
        _stopped(atomic_file(file), lambda temporary: temporary.write_text("half"))
    assert read_json(file, "it") == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("block", [atomic_file, atomic_folder])
def test_a_full_disk_is_said_of_the_file_that_was_asked_for(tmp_path, block):
    """As the system says it, of no file; and of the hidden one. Other errors stay as they are."""
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught, block(tmp_path / "a"):
        full.write_text("x")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as caught, block(tmp_path / "a") as temporary:
        (temporary.parent / "not" / "there").touch()
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="elsewhere"), block(tmp_path / "a"):
        (tmp_path / "elsewhere").read_text()
    assert list(tmp_path.iterdir()) == []


def test_json_has_an_item_a_line_and_numbers_on_one(tmp_path):
    """What it means is what `json` writes, keys that are no texts included; the file ends with a line's end."""
    value = {"empty": [{}, []], "keep": {3: [1, 2], "4": [[1], [2.5, None]]}, "text": 'a "é"\n', True: (1, "b")}
    write_json(tmp_path / "a", value)
    assert read_json(tmp_path / "a", "it") == json.loads(json.dumps(value))
    lines = (tmp_path / "a").read_text().splitlines()
    assert lines[:8] == ["{", ' "empty": [', "  {},", "  []", " ],", ' "keep": {', '  "3": [1, 2],', '  "4": [']
    assert (tmp_path / "a").read_text().endswith("}\n")


def test_folder_keeps_the_old_when_stopped(tmp_path):
    for expected in ([], ["whole"]):
        with pytest.raises(KeyboardInterrupt):
            _stopped(atomic_folder(tmp_path / "f"), lambda temporary: (temporary / "half").touch())
        assert sorted(p.name for p in tmp_path.glob("f/*")) == expected
        assert len(list(tmp_path.iterdir())) == len(expected)
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / "whole").touch()
    assert [p.name for p in tmp_path.glob("f/*")] == ["whole"]


def test_a_replaced_folder_is_there_at_every_moment(tmp_path):
    """A kill finds the old folder or the new one. Mutation: two renames instead of an exchange fail here."""
    from nemo_minitron.artifacts.files import _exchange

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not _exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    watch = (
        "import os, sys; print(flush=True); missing = 0\n"
        "while not os.path.exists(sys.argv[2]): missing += not os.path.exists(sys.argv[1])\n"
        "sys.exit(missing > 0)"
    )
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "file").write_text("0")
    command = [sys.executable, "-c", watch, str(tmp_path / "f" / "file"), str(tmp_path / "stop")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as watcher:
        watcher.stdout.readline()
        for number in range(300):
            with atomic_folder(tmp_path / "f") as temporary:
                (temporary / "file").write_text(str(number))
        (tmp_path / "stop").touch()
    assert watcher.returncode == 0
    assert (tmp_path / "f" / "file").read_text() == "299"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "f", "stop"]


def test_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.artifacts.files._exchange", lambda *_: False)
    test_folder_keeps_the_old_when_stopped(tmp_path)


def test_disk_too_small(tmp_path):
    need_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(InputError, match="GB free"):
        need_space(tmp_path / "not" / "yet", 1 << 60)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP, None])
def test_reserved(tmp_path, monkeypatch, number):
    """As long as asked for; a full disk tells, a file system that cannot reserve does not. None: the real one."""

    def fallocate(*_):
        ctypes.set_errno(number)
        return -1

    if number is not None:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=fallocate))
    full = number in (errno.ENOSPC, errno.EDQUOT)
    with open(tmp_path / "file", "wb") as stream:
        stream.write(b"header")
        stream.flush()
        with pytest.raises(OSError, match=os.strerror(number)) if full else nullcontext():
            reserve(stream.fileno(), 100_000)
    assert full or (tmp_path / "file").read_bytes() == b"header" + bytes(100_000 - 6)


def test_digest_of_is_canonical():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})


def test_manifest(tmp_path):
    manifest = Manifest.open(tmp_path / "manifest.json")
    manifest.finish("plan", 1.234, "d1")
    manifest.finish("prune", 2.0, "d2")
    manifest.finish("plan", 3.0, "d3")
    again = Manifest.open(tmp_path / "manifest.json")
    assert [stage["name"] for stage in again.stages] == ["prune", "plan"]
    assert again.done("plan", "d3")
    assert not again.done("plan", "d1")


def test_rounding_is_torchs():
    import torch

    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 0.0]  # ties go to even
    expected = torch.tensor(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bf16_bits(values.view(np.uint32), "F32"), expected)
    half = values.astype(np.float16)
    expected = torch.tensor(half).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bf16_bits(half.view(np.uint16), "F16"), expected)


def test_model_digest_sees_sampled_elements_names_and_shapes():
    architecture = smollm2(num_layers=1, hidden_size=6, ffn_hidden_size=8, head_dim=2, vocab_size=11)
    shapes = architecture.shapes()
    tensors = {n: np.arange(math.prod(s), dtype=np.uint16).reshape(s) for n, s in shapes.items()}

    def digest(model=architecture):
        return model_digest(model, lambda name, index: tensors[name][np.ix_(*index)])

    first = digest()
    assert digest() == first
    tensors["layers.0.q.weight"][sample_index("layers.0.q.weight", (18, 6))[0][3], 2] ^= 1
    assert digest() != first


def test_sample_is_seeded_sorted_and_small():
    rows, columns = sample_index("layers.0.q.weight", (1000, 8))
    assert len(rows) == 16
    np.testing.assert_array_equal(columns, np.arange(8))
    assert (np.diff(rows) > 0).all()
    again = sample_index("layers.0.q.weight", (1000, 8))[0]
    np.testing.assert_array_equal(rows, again)
    assert not np.array_equal(rows, sample_index("layers.0.k.weight", (1000, 8))[0])
