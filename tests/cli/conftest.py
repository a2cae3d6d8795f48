"""One finished run of the main job for all tests of this folder, in whichever of pytest's processes they run."""

import os

import pytest
from command_line import compressed
from filelock import FileLock


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A teacher, a corpus, and `run`: what `minitron compress` made of them. No test writes into `run`.

    Made with a Transformer Engine on the path that does not import, as its package does on a machine without a GPU.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compress"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            engine = folder / "site" / "transformer_engine"
            engine.mkdir(parents=True)
            (engine / "__init__.py").write_text("raise RuntimeError('libcuda.so.1: cannot open shared object file')")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", str(engine.parent), prepend=os.pathsep)
                compressed(folder)
            (folder / "whole").touch()
    assert (folder / "whole").exists(), "it could not be made"
    return folder
