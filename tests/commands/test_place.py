"""Where a command writes: what is refused at once, and the hidden folder."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from nemo_minitron.commands.place import check_file, check_writable, working
from nemo_minitron.errors import InputError


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"is a folder; give the name of a file with --out"):
        check_file(tmp_path)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written: '.*file' is a file, not a folder"):
        check_writable(tmp_path / "file" / "below" / "out")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "out")


@pytest.fixture
def readonly():
    """A folder that this process may read and not write to; root writes everywhere, so root becomes nobody."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written(readonly):
    for out in (readonly / "out", readonly / "new" / "out", readonly):
        with pytest.raises(InputError, match="you may not write to"):
            check_writable(out)


def test_the_hidden_folder_stays_until_the_command_succeeds(tmp_path):
    out = tmp_path / "scores"

    def fail():
        with working(out) as work:
            (work / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / ".scores.work" / "half").exists()
    with working(out) as work:
        assert (work / "half").exists()
    assert list(tmp_path.iterdir()) == []
