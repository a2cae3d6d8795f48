"""Seals of finished files: what is cut short, gone or changed is found, and all of it is on the disk before."""

import os

import pytest

from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts import seals as module
from nemo_minitron.artifacts.seals import PIECES, SMALL, damaged, seal, sealed


@pytest.fixture
def student(tmp_path):
    (tmp_path / "student" / "deep").mkdir(parents=True)
    (tmp_path / "student" / "model.safetensors").write_bytes(os.urandom(SMALL + 12345))
    (tmp_path / "student" / "deep" / "config.json").write_text('{"a": 1}')
    (tmp_path / "numbers.json").write_text("[]")
    return tmp_path


def test_what_is_whole_is_not_damaged(student):
    seals = sealed(student, ["student", "numbers.json", "not there"])
    assert sorted(seals) == ["numbers.json", "student/deep/config.json", "student/model.safetensors"]
    assert damaged(student, seals) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.unlink(), "is gone"),
        (lambda file: os.truncate(file, 1000), "has 1,000 of its 4,206,649 bytes"),
        (lambda file: write_at(file, 0), "was changed"),
        (lambda file: write_at(file, SMALL + 12344), "was changed"),
        (lambda file: write_at(file, SMALL // 2, 1 << 18), "was changed"),  # as blocks that a power cut left empty
    ],
)
def test_damage_is_named(student, change, said):
    seals = sealed(student, ["student"])
    change(student / "student" / "model.safetensors")
    assert damaged(student, seals) == {"student/model.safetensors": said}


def write_at(file, position, size=1):
    with open(file, "r+b") as stream:
        stream.seek(position)
        old = stream.read(size)
        stream.seek(position)
        stream.write(bytes(255 - byte for byte in old))


def test_a_small_file_is_read_whole_and_a_large_one_in_pieces(student, monkeypatch):
    read = []
    monkeypatch.setattr(
        module.os, "pread", lambda handle, size, at, pread=os.pread: read.append(size) or pread(handle, size, at)
    )
    seal(student / "student" / "deep" / "config.json")
    assert read == [8]
    seal(student / "student" / "model.safetensors")
    assert len(read) == 1 + PIECES


def test_files_and_folders_are_synced_before_the_manifest_says_so(student, monkeypatch):
    """In the order: each file, the folders that name it, the manifest's own."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    Manifest.open(student / "manifest.json").finish("export", 1.0, "d", ["student"])
    names = [os.path.relpath(path, student) for path in synced]
    wanted = ["student/deep/config.json", "student/model.safetensors", ".", "student", "student/deep"]
    assert names[:5] == wanted
    assert names[5].endswith("/manifest.json")
    assert Manifest.open(student / "manifest.json").damaged("export") == {}


def test_the_last_stage_that_wrote_a_file_answers_for_it(student):
    manifest = Manifest.open(student / "manifest.json")
    manifest.finish("export", 1.0, "d", ["student"])
    (student / "student" / "deep" / "config.json").write_text('{"a": 2}')
    manifest.finish("report", 1.0, "d", ["student/deep/config.json"])
    assert manifest.damaged("export") == manifest.damaged("report") == {}
    (student / "student" / "deep" / "config.json").unlink()
    assert manifest.damaged("export") == {}
    assert manifest.damaged("report") == {"student/deep/config.json": "is gone"}
    assert manifest.damaged("export", ["student/deep/config.json"]) == {"student/deep/config.json": "is gone"}
