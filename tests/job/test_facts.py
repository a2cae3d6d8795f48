"""What the model card says stands in place of slices, from the record of the cut."""

import json
from types import SimpleNamespace

import pytest

from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.job.stages.facts import _in_place

FITTED = {"ridge": 0.01, "samples": 4, "sequence_length": 36, "method": "least squares"}
MERGED = {"merged experts": {"0": {"1": [0, 2], "3": [4]}, "2": {"0": [5]}}}
HEADS = "1 matrices that lost inputs to the cut, re-fitted by least squares, ridge 0.01, on 4 samples of 36 tokens"
EXPERTS = "4 dropped experts averaged into the kept ones with the most similar rows of the router"


@pytest.mark.parametrize(
    ("names", "notes", "words"),
    [
        (["layers.0.experts.1.down.weight"], MERGED, EXPERTS),
        (["layers.0.experts.1.down.weight", "layers.0.o.weight"], FITTED | MERGED, f"{HEADS}; {EXPERTS}"),
        (["layers.0.experts.1.down.weight"], FITTED, HEADS),
        (["final_norm.weight"], {"folded norms": True}, "norms scaled, because hidden channels were cut"),
    ],
)
def test_in_place_of_slices(tmp_path, names, notes, words):
    """Averaged experts do not count among the re-fitted matrices."""
    folder = RunFolder(tmp_path)
    folder.pruned.mkdir(parents=True)
    (folder.pruned / "minitron_compensation.json").write_text(json.dumps({"tensors": names} | notes))
    assert _in_place(SimpleNamespace(folder=folder)) == words
