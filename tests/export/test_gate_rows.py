"""The gates of a run in its report: figures, limits and results, read from the run folder alone."""

import json

import pytest
from run_folder import page, write

from nemo_minitron.errors import InputError
from nemo_minitron.export.gate_rows import gate_note, gate_rows
from nemo_minitron.export.run import read_run

GATES = [
    {"name": "same", "state": "passed", "note": "n1", "figure": 1.26e-6, "limit": 1e-3, "error": None},
    {"name": "whole", "state": "passed", "note": "n2", "figure": 0.0, "limit": 1e-3, "error": None},
    {"name": "order", "state": "failed", "note": "n3", "figure": -0.5, "limit": None, "error": 0.02},
    {"name": "none", "state": "not checked", "note": "<b>n4</b>", "figure": None, "limit": None, "error": None},
]
FOUND = {"plan": "0" * 64, "rows": 8, "sequence_length": 128, "precision": "fp32", "gates": GATES}


def test_rows():
    assert gate_rows(FOUND) == [
        ["same", "1.3e-06", "1.0e-03", "passed", "n1"],
        ["whole", "0", "1.0e-03", "passed", "n2"],
        ["order", "-0.500 ± 0.020 nats", "–", "failed", "n3"],
        ["none", "–", "–", "not checked", "<b>n4</b>"],
    ]
    assert gate_note(FOUND) == "On 8 held-out rows of 128 tokens, in fp32, with plain slices of the teacher."
    assert (gate_rows({}), gate_note({})) == ([], "")


def test_the_report_shows_them(tmp_path):
    write(tmp_path, "recipe.json", {"name": "r"})
    assert "Gates of the cut" not in page(tmp_path).words
    write(tmp_path, "gates.json", FOUND)
    shown = page(tmp_path)
    assert "Gates of the cut" in shown.words
    assert {"same", "failed", "-0.500 ± 0.020 nats", "<b>n4</b>"} <= set(shown.words)


def test_a_damaged_file_is_refused(tmp_path):
    write(tmp_path, "recipe.json", {"name": "r"})
    write(tmp_path, "gates.json", json.loads(json.dumps(FOUND).replace("-0.5", '"much"')))
    with pytest.raises(InputError, match=r"the gates .*gates.2.figure.* is 'much', not a finite number"):
        read_run(tmp_path)
