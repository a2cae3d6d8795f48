"""Shared by all tests: no hub, one thread a process, and `tests/` importable (pico models, tolerances)."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Under `-n 2 --dist loadgroup` a file stays with one worker, and so do all of a folder that share its fixtures."""
    for item in items:
        together = item.path.parent if item.path.parent.name == "cli" else item.path
        item.add_marker(pytest.mark.xdist_group(str(together)))
