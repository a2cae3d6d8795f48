"""The line that says what ended a worker."""

import errno
import os

import pytest

from nemo_minitron.hosts import failure
from nemo_minitron.hosts.failure import words


def full(name=None):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (full("/run/loss.csv"), "No space left on device: '/run/loss.csv' could not be written"),
        (full(), "No space left on device: '/run/training' could not be written"),
        (
            RuntimeError("PytorchStreamWriter failed"),
            "'/run/training' could not be written: PytorchStreamWriter failed",
        ),
        (MemoryError(), "it ran out of memory (MemoryError: MemoryError)"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            "it ran out of memory (RuntimeError: CUDA out of memory. Tried to allocate 2 GiB)",
        ),
        (ValueError("broken\nsecond line"), "ValueError: broken"),
        (FileNotFoundError(2, "No such file", "/x"), "FileNotFoundError: [Errno 2] No such file: '/x'"),
    ],
)
def test_the_cause_in_words(error, said):
    assert words(error, "/run/training") == said


def test_what_led_to_an_error_tells_more_than_it():
    later = RuntimeError("a writer failed")
    later.__cause__ = full("/run/chunk")
    assert words(later, "") == "No space left on device: '/run/chunk' could not be written"


def test_a_full_disk_is_said_where_a_writer_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr(failure.shutil, "disk_usage", lambda place: failure.shutil._ntuple_diskusage(10, 10, 0))
    error = RuntimeError("PytorchStreamWriter failed writing file")
    assert words(error, tmp_path / "a") == f"'{tmp_path / 'a'}' could not be written: No space left on device"
