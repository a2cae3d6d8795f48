"""Which layers a plan drops by a criterion of depth."""

import numpy as np
import pytest
from test_architecture import smollm2

from nemo_minitron.artifacts import Scores
from nemo_minitron.errors import InputError
from nemo_minitron.search import plan

SOURCE = smollm2(num_layers=6)
LOSS = {(0, -1): 2.0}  # the best pair is 2-3, though the best two single layers are 1 and 4
LOSS |= {(i, i): value for i, value in enumerate([9.0, 2.1, 2.5, 2.4, 2.2, 5.0])}
LOSS |= {(i, i + 1): value for i, value in enumerate([9.5, 3.0, 2.7, 2.9, 6.0])}
ACCURACY = {(0, -1): 0.9} | {(i, i + 1): value for i, value in enumerate([0.2, 0.5, 0.6, 0.6, 0.3])}
REMOVAL = {(4, 4): 0.1, (1, 1): 0.3, (3, 3): 0.2}  # in the order of removal, not of errors


@pytest.fixture
def scores(tmp_path):
    """As a file gives them back: the order of the entries counts."""
    influence = np.array([1, 0.1, 0.2, 0.3, 0.4, 0.5], np.float32)
    depth = {"loss": LOSS, "accuracy": ACCURACY, "removal": REMOVAL, "perplexity": {(0, -1): 7.0}}
    Scores(SOURCE, {"layers": influence}, depth=depth).save(tmp_path / "scores.safetensors")
    return Scores.load(tmp_path / "scores.safetensors")


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({}, [1, 2]),  # block influence
        ({"depth": "loss"}, [2, 3]),
        ({"depth": "loss", "contiguous": False}, [1, 4]),
        ({"depth": "loss", "least": True}, [0, 1]),
        ({"depth": "loss", "least": True, "contiguous": False}, [0, 5]),
        ({"depth": "accuracy"}, [3, 4]),  # the higher is the better; of two equal blocks the later goes
        ({"depth": "accuracy", "least": True}, [0, 1]),
        ({"depth": "removal"}, [1, 4]),
    ],
)
def test_dropped_layers(scores, options, dropped):
    made = plan(scores, {"layers": 4}, **options)
    assert made.keep == {"layers": [i for i in range(6) if i not in dropped]}
    assert made.target == SOURCE.replace(num_layers=4)
    assert made.notes.get("depth") == options.get("depth")


def test_listed_layers_and_other_axes_are_untouched(scores):
    assert plan(scores, {"layers": [0, 1, 2, 5]}, depth="loss").keep == {"layers": [0, 1, 2, 5]}
    assert plan(scores, {}, depth="loss").keep == {}


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (4, {"depth": "los"}, "no depth criterion 'los'; did you mean 'loss'?"),
        (4, {"depth": "x"}, "legal are: accuracy, block_influence, loss, perplexity, removal"),
        (2, {"depth": "loss"}, "scanned for blocks of 1 and 2 layers, not for all of 4; scan sizes=4"),
        (2, {"depth": "loss"}, "or drop single layers with contiguous=False"),
        (2, {"depth": "accuracy"}, "scanned for blocks of 2 layers, not for all of 4; scan sizes=4; the nearest"),
        (
            4,
            {"depth": "accuracy", "contiguous": False},
            "not for all of 1; scan sizes=1; the nearest size scanned is 2",
        ),
        (4, {"depth": "perplexity"}, "'perplexity' was scanned for no block; scan blocks of 2 layers"),
        (1, {"depth": "removal"}, "removal stopped after 3 layers, 5 are to be dropped; the nearest legal number is 3"),
        (4, {"depth": "removal", "least": True}, "which layers matter least"),
    ],
)
def test_refusals(scores, layers, options, message):
    with pytest.raises(InputError) as caught:
        plan(scores, {"layers": layers}, **options)
    assert message in str(caught.value)


def test_a_part_of_a_size_is_no_scan(scores):
    del scores.depth["loss"][3, 4]
    with pytest.raises(InputError, match="not for all of 2"):
        plan(scores, {"layers": 4}, depth="loss")
