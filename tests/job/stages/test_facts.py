"""What a card says of the student and of its base, from the files of the run."""

import json
from types import SimpleNamespace

import pytest
from pico import SIZES

from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.job import Cutting, Data, Job
from nemo_minitron.job.stages.facts import ROTATED, _in_place, larger_files

FITTED = {"ridge": 0.01, "samples": 4, "sequence_length": 36, "method": "least squares"}
MERGED = {"merged experts": {"0": {"1": [0, 2], "3": [4]}, "2": {"0": [5]}}}
HEADS = "1 matrices that lost inputs to the cut, re-fitted by least squares, ridge 0.01, on 4 samples of 36 tokens"
FILLED = {"filled gaps": ["layers.1.down.weight"], "scaled behind dropped layers": {"2": 0.5}}
WHOLE = {"reconstruct": 3, "held-out error of each sub-block, as a share of its start's": {"0 MLP": 0.9, "1 MLP": 1.0}}
GAP = "1 matrices in front of dropped layers, re-fitted on 4 samples of 36 tokens to write what these wrote"
SCALED = "what is written to the residual stream behind dropped layers, scaled to its length there"
EXPERTS = "4 dropped experts averaged into the kept ones with the most similar rows of the router"


@pytest.mark.parametrize(("scheme", "count"), [({"quant_method": "mxfp4"}, 1), (None, 0)])
def test_a_base_in_mxfp4(tmp_path, scheme, count):
    config = SIZES | {"architectures": ["GptOssForCausalLM"], "quantization_config": scheme}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sentences = larger_files(tmp_path)
    assert len(sentences) == count
    assert all("published in MXFP4; this model is stored in bf16" in sentence for sentence in sentences)


def test_a_base_that_is_no_folder_of_hugging_face(tmp_path):
    assert larger_files(tmp_path) == []


@pytest.mark.parametrize(
    ("names", "notes", "words"),
    [
        (["layers.0.experts.1.down.weight"], MERGED, EXPERTS),
        (["layers.0.experts.1.down.weight", "layers.0.o.weight"], FITTED | MERGED, f"{HEADS}; {EXPERTS}"),
        (["layers.0.experts.1.down.weight"], FITTED, HEADS),
        (
            ["layers.0.o.weight"],
            FITTED | {"ridge": "auto"},
            HEADS.replace("0.01", "chosen for each on held-out samples"),
        ),
        (["final_norm.weight"], {"folded norms": True}, "norms scaled, because hidden channels were cut"),
        ([], {"scaled behind dropped layers": {"2": 0.5}}, SCALED),
        (["layers.0.o.weight", "layers.1.down.weight"], FITTED | FILLED, f"{HEADS}; {GAP}; {SCALED}"),
        (
            ["layers.0.o.weight"],
            FITTED | WHOLE,
            f"{HEADS}; 1 of 2 sub-blocks that were cut, fitted as a whole in 3 passes",
        ),
    ],
)
def test_in_place_of_slices(tmp_path, names, notes, words):
    """Averaged experts do not count among the re-fitted matrices."""
    folder = RunFolder(tmp_path)
    folder.pruned.mkdir(parents=True)
    (folder.pruned / "minitron_compensation.json").write_text(json.dumps({"tensors": names} | notes))
    assert _in_place(SimpleNamespace(folder=folder, job=job_of(rotate=False))) == words
    assert _in_place(SimpleNamespace(folder=folder, job=job_of(rotate=True))) == f"{ROTATED}; {words}"


def test_rotated_slices(tmp_path):
    found = [_in_place(SimpleNamespace(folder=RunFolder(tmp_path), job=job_of(rotate=r))) for r in (False, True)]
    assert found == ["", ROTATED]


def job_of(**cutting):
    return Job("pico", "teacher", Data("a", "b"), keep={"hidden": 40}, cutting=Cutting(**cutting))
