"""One finished run of the main job for all tests of this folder, in whichever of pytest's processes they run."""

import os

import pytest
from command_line import compressed
from filelock import FileLock


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A teacher, a corpus, and `run`: what `minitron compress` made of them. No test writes into `run`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compress"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            compressed(folder)
            (folder / "whole").touch()
    assert (folder / "whole").exists(), "it could not be made"
    return folder
