"""Bytes from file to file: the same ones whatever the system gives at a time, looked through; one writer to a file."""

import errno
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from pico import pico_llama, raw_tensors
from plans_by_hand import slice_by_hand, width_and_depth

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune, write_weights
from nemo_minitron.pruning.student import Student
from nemo_minitron.sources import folder, streams
from nemo_minitron.sources.streams import ByteRange, Sink
from nemo_minitron.sources.tensors import whole

BYTES = np.random.default_rng(0).integers(0, 100, 300_000, np.uint8)  # finite, whatever dtype is read into them


def sink(stream, position, dtype="BF16"):
    return Sink(stream.fileno(), position, threading.Lock(), dtype, "some.weight")


def test_runs_are_copied(tmp_path, monkeypatch):
    """A run longer than a buffer, reads that give less than they are asked for, and nothing touched beside them."""
    preadv = os.preadv
    monkeypatch.setattr(streams, "BUFFER", 70_000)
    monkeypatch.setattr(streams.os, "preadv", lambda handle, views, at: preadv(handle, [views[0][:999]], at))
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(BYTES)
    target.write_bytes(bytes(400_000))
    with open(target, "r+b", buffering=0) as stream:
        out = sink(stream, 1001)
        out.copy(source, [ByteRange(5, 4), ByteRange(17, 200_000), ByteRange(299_998, 2)])
        out.write(BYTES[:10].view(np.uint16)[::2])
        assert out.position == 1001 + 200_006 + 6
    copied = np.concatenate([BYTES[5:9], BYTES[17:200_017], BYTES[-2:], BYTES[[0, 1, 4, 5, 8, 9]]])
    expected = bytes(1001) + copied.tobytes()
    assert target.read_bytes() == expected + bytes(400_000 - len(expected))


def test_a_source_that_ends_early(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(BYTES)
    with open(tmp_path / "target", "wb", buffering=0) as stream, pytest.raises(InputError, match="ends at byte 300000"):
        sink(stream, 0).copy(source, [ByteRange(299_000, 2000)])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_the_disk_says_is_told(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(streams.os, "pwrite", refused)
    source = tmp_path / "source"
    source.write_bytes(BYTES)
    with open(tmp_path / "target", "wb", buffering=0) as stream, pytest.raises(OSError, match=os.strerror(number)):
        sink(stream, 0).copy(source, [ByteRange(0, 10)])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("dtype", "kind"), [("BF16", np.float32), ("F16", "e"), ("F32", "f"), ("F64", "d")])
@pytest.mark.parametrize("place", [0, 777, 9_999])
def test_a_number_that_is_none_is_not_passed_on(tmp_path, dtype, kind, bad, place):
    """Of every dtype and sign, at the ends and within; the largest finite numbers pass."""
    values = np.random.default_rng(0).normal(0, 1, 10_000).astype(kind)
    values[[3, 5]] = np.finfo(kind).max, np.finfo(kind).min
    for changed in (False, True):
        if changed:
            values[place] = np.copysign(bad, -1) if str(bad) == "nan" and place == 777 else bad
        raw = values.view(f"u{values.itemsize}")
        raw = (raw >> 16).astype(np.uint16) if dtype == "BF16" else raw  # truncated: the largest stays finite
        (tmp_path / "source").write_bytes(raw.tobytes())
        for copy in (True, False):
            with open(tmp_path / "target", "wb", buffering=0) as stream:
                out = sink(stream, 0, dtype)
                put = functools.partial(out.copy, tmp_path / "source", [ByteRange(0, raw.nbytes)]) if copy else None
                put = put or functools.partial(out.write, raw)
                if changed:
                    with pytest.raises(InputError, match=r"'some.weight' hold a number that is not finite"):
                        put()
                else:
                    put()


def test_a_writer_that_is_told_less_goes_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(streams.os, "pwrite", lambda handle, data, place: pwrite(handle, data[:777], place))
    with open(tmp_path / "target", "wb", buffering=0) as stream:
        sink(stream, 0).write(BYTES.reshape(3, -1))
    assert (tmp_path / "target").read_bytes() == BYTES.tobytes()


# -- what a folder copies in runs ----------------------------------------------------------------------
class Noted(Sink):
    """Puts everything into one list of bytes, and counts the runs of each copy."""

    def __init__(self):
        super().__init__(-1, 0, threading.Lock(), "F32", "noted")
        self.data, self.copies = b"", []

    def write(self, block):
        self.data += np.ascontiguousarray(block).tobytes()

    def copy(self, file, runs):
        data = file.read_bytes()
        self.data += b"".join(data[run.position : run.position + run.size] for run in runs)
        self.copies.append(len(runs))


def streamed(source, name, index):
    noted = Noted()
    source.stream(name, index, noted)
    assert noted.data == source.read(name, index).tobytes(), name
    return noted.copies


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stream_is_what_reading_gives(tmp_path, monkeypatch, dtype):
    """Whole tensors and ranges of rows go in runs, short runs of rows do not, columns never."""
    source = HFSource(pico_llama(tmp_path, dtype=dtype))
    generator = np.random.default_rng(0)
    for name, shape in source.architecture.shapes().items():
        rows, (_, *columns) = np.flatnonzero(generator.random(shape[0]) < 0.5), whole(shape)
        assert streamed(source, name, whole(shape)) == [1]
        assert streamed(source, name, (np.arange(3, 11), *columns)) == [1]
        assert streamed(source, name, (rows, *columns)) == []
        with monkeypatch.context() as patch:
            patch.setattr(folder, "LEAST", 1)
            assert streamed(source, name, (rows, *columns)) == [1 + int(np.sum(np.diff(rows) > 1))]
            for kept in columns:
                assert streamed(source, name, (rows, kept[1:])) == []
        with monkeypatch.context() as patch:
            patch.setattr(folder, "BLOCK", 500)
            assert streamed(source, name, (rows, *(kept[:-1] for kept in columns))) == []


@pytest.mark.parametrize("kept", [[0, 1], [1, 4], [0, 2, 3], [5]])
def test_columns_in_units(tmp_path, monkeypatch, kept):
    """Heads of 8 columns are picked as wholes; the same columns one by one, and those that are no units, agree."""
    source, tensor = HFSource(pico_llama(tmp_path, dtype="bfloat16")), "layers.0.o.weight"
    expected = raw_tensors(tmp_path)["model.layers.0.self_attn.o_proj.weight"]
    units = np.concatenate([np.arange(8 * head, 8 * head + 8) for head in kept])
    assert folder._in_units(units, 48)
    for columns in (units, units[1:], units[:-1], np.sort((units + 1) % 48), np.arange(0, 48, 3)):
        found = source.read(tensor, (np.arange(5, 30), columns))
        np.testing.assert_array_equal(found, expected[5:30][:, columns], strict=True)
    monkeypatch.setattr(folder, "_in_units", lambda *_: False)
    found = source.read(tensor, (np.arange(5, 30), units))
    np.testing.assert_array_equal(found, expected[5:30][:, units], strict=True)


def test_no_rows_and_rows_out_of_range(tmp_path):
    source = HFSource(pico_llama(tmp_path))
    columns = np.arange(48)
    assert streamed(source, "layers.0.q.weight", (np.arange(0), columns)) == [0]
    for rows in ([-1, 0], [47, 48]):
        with pytest.raises(IndexError):
            source.stream("layers.0.q.weight", (np.array(rows), columns), Noted())


def test_what_is_solved_is_not_copied(tmp_path):
    source = HFSource(pico_llama(tmp_path))
    plan = PrunePlan(source=source.architecture, target=source.architecture, keep={})
    name = "layers.0.q.weight"
    solved = Compensation(plan.digest, {name: np.ones((48, 48), np.float32)})
    for compensation, copies in ((None, [1]), (solved, [])):
        noted = Noted()
        Student(source, plan, compensation).put(name, noted)
        assert noted.copies == copies
    assert noted.data == np.ones((48, 48), np.float32).tobytes()


# -- the whole cut -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return pico_llama(tmp_path_factory.mktemp("teacher"), dtype="bfloat16", attention_bias=True)


@pytest.mark.parametrize("least", [0, 1 << 20])
def test_the_same_student_by_runs_and_by_blocks(tmp_path, monkeypatch, teacher, least):
    monkeypatch.setattr(folder, "LEAST", least)
    source = from_hf(teacher)
    depth = PrunePlan(source=source, target=source.replace(num_layers=3), keep={"layers": [1, 2, 4]})
    ffn = {layer: [i for i in range(96) if i % 5] for layer in range(6)}
    rows = PrunePlan(source=source, target=source.replace(ffn_hidden_size=76), keep={"ffn": ffn})
    for name, plan in (("depth", depth), ("rows", rows), ("both", width_and_depth(source))):
        student = raw_tensors(prune(teacher, plan, tmp_path / name))
        expected = slices(raw_tensors(teacher), plan)
        assert student.keys() == expected.keys()
        for tensor, value in expected.items():
            np.testing.assert_array_equal(student[tensor], value, err_msg=tensor, strict=True)


def slices(tensors, plan):
    everything = {"layers": list(range(6)), "heads": {layer: list(range(6)) for layer in range(6)}}
    return slice_by_hand(tensors, SimpleNamespace(keep=everything | plan.keep))


def test_one_thread_at_a_time_writes_to_a_file(tmp_path, monkeypatch, teacher):
    """Mutation: a lock for each tensor lets two in."""
    inside, most = [0], [0]

    def watched(call):
        def counted(*arguments):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.003)  # so that a second one would come while the first is in
            try:
                return call(*arguments)
            finally:
                inside[0] -= 1

        return counted

    monkeypatch.setattr(streams.os, "pwrite", watched(os.pwrite))
    out = tmp_path / "s"
    out.mkdir()
    source = HFSource(teacher)
    write_weights(source, width_and_depth(source.architecture), out, source.config, threads=4)
    assert most == [1]


def test_killed_while_it_copies(tmp_path, teacher):
    """The old student, byte for byte, and the next cut is not disturbed."""
    student = tmp_path / "s"
    source = from_hf(teacher)
    prune(teacher, PrunePlan(source=source, target=source, keep={}), student)
    old = {file.name: file.read_bytes() for file in student.iterdir()}
    plan = PrunePlan(source=source, target=source.replace(num_layers=2), keep={"layers": [0, 5]})
    plan.save(tmp_path / "plan.json")
    code = f"""
import os
from nemo_minitron.pruning import prune
from nemo_minitron.sources import streams
fill, calls = streams._fill, []
def killed(*arguments):
    calls.append(arguments)
    if len(calls) == 9:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return fill(*arguments)
streams._fill = killed
prune({str(teacher)!r}, {str(tmp_path / "plan.json")!r}, {str(student)!r}, overwrite=True)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert {file.name: file.read_bytes() for file in student.iterdir()} == old
    prune(teacher, plan, student, overwrite=True)
    assert from_hf(student).num_layers == 2
