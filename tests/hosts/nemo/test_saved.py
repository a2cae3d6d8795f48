"""Of a training's checkpoints, only the newest complete one stays."""

import os

import pytest
from checkpoints import save_small

from nemo_minitron.hosts.nemo.saved import damage, keep_whole


@pytest.fixture
def folder(tmp_path):
    for step in (1, 3):
        save_small(tmp_path / f"step={step}-last")
    return tmp_path


def test_the_newest_whole_one_stays(folder):
    (folder / "step=9-last").mkdir()
    (folder / "step=9-last-unfinished").touch()
    (folder / "notes").mkdir()
    assert damage(folder / "step=3-last") == ""
    assert keep_whole(folder) == ({4: folder / "step=3-last"}, [])
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "step=3-last"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda last: chunk(last).unlink(), "does not have"),
        (lambda last: os.truncate(chunk(last), 1000), "does not have"),
        (lambda last: (last / "weights" / ".metadata").unlink(), "has no .metadata"),
        (lambda last: os.truncate(last / "weights" / ".metadata", 20), "was refused"),
        (lambda last: os.truncate(last / "weights" / "common.pt", 100), "common.pt is gone or cut short"),
        (lambda last: (last / "weights" / "metadata.json").write_text("{"), "Expecting"),
        (lambda last: (last / "context" / "io.json").unlink(), "io.json"),
    ],
)
def test_a_damaged_one_goes_and_the_one_before_is_taken(folder, change, said):
    last = folder / "step=3-last"
    change(last)
    assert said in damage(last)
    kept, (line,) = keep_whole(folder)
    assert kept == {2: folder / "step=1-last"}
    assert line.startswith(f"the checkpoint {last} is damaged (")
    assert not last.exists()


def chunk(last):
    return next((last / "weights").glob("*.distcp"))
