"""The distributed optimizer's state, saved for another layout: `backend.optimizer.save_whole`."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

WORKER = Path(__file__).with_name("saved_optimizer_worker.py")


@pytest.mark.slow
def test_every_parameter_is_saved_from_its_place(tmp_path):
    """A tied embedding in stages has a bucket of its own, whose size 128 does not divide here. Without `save_whole` the
    parameters behind it are those of other places."""
    run_ranks(2, WORKER, tmp_path / "found.json")
    for found, buckets in json.loads((tmp_path / "found.json").read_text()):
        assert buckets == [2]
        assert len(found) > 5
        assert set(found.values()) == {0.0}, found
