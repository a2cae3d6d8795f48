"""Shared by all tests: no hub, one thread a process, and `tests/` importable (pico models, tolerances)."""

import datetime
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_XET_HIGH_PERFORMANCE", "1")  # lm-eval sets it, and `forked.py` would fork no command any more
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


@pytest.fixture
def forking(monkeypatch):
    """What the test itself starts by `python -m` is forked, too (`forked.py`)."""
    import subprocess

    import forked

    monkeypatch.setattr(subprocess.Popen, "_execute_child", forked.Forked._execute_child)


@pytest.fixture(scope="module")
def one_process():
    """Megatron's groups of one process; other test files may have made them."""
    import bare_models
    import torch

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        wait = datetime.timedelta(seconds=60)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=wait)
    bare_models.start()
