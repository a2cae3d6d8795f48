"""Shared by all tests: no hub, one thread a process, and `tests/` importable (pico models, tolerances)."""

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """Files that start processes come first, so that none of them runs alone at the end beside an idle worker. Without
    NeMo its tests are skipped."""
    if not any(metadata.packages_distributions().get("nemo", ())):  # a folder of tests has this name, too
        for item in items:
            if item.get_closest_marker("nemo"):
                item.add_marker(pytest.mark.skip(reason="NeMo is not installed here"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
