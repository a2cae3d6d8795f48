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
    """Files that start processes come first, so that none of them runs alone at the end beside an idle worker. Tests of
    a host that is not installed are skipped."""
    for name, distribution in (("nemo", "nemo_toolkit"), ("bridge", "megatron-bridge")):
        for item in items if not _installed(distribution) else ():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{distribution} is not installed here"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _installed(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
