"""Layers that are listed in a text, and numbers of layers of each kind of a hybrid."""

import numpy as np
import pytest
from test_architecture import smollm2

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.commands.plan import run_plan
from nemo_minitron.errors import InputError
from nemo_minitron.search import parse, plan, random_plan
from nemo_minitron.search.numbers import numbers
from nemo_minitron.search.rounds import round_sizes
from nemo_minitron.search.sizes import student_architecture
from nemo_minitron.settings.plain import build
from nemo_minitron.settings.recipe import Job
from nemo_minitron.settings.search import Search

SIZES = {"num_layers": 9, "hidden_size": 12, "ffn_hidden_size": 20, "num_attention_heads": 6, "head_dim": 2}
DENSE = smollm2(**SIZES, vocab_size=11)
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 3, "mamba_num_groups": 2, "mamba_state_dim": 5}
HYBRID = smollm2(**SIZES, vocab_size=11, hybrid_pattern="M-M*-M-M*", gated_mlp=False, **MAMBA)


def scores(architecture, influence):
    generator = np.random.default_rng(5)
    tensors = {n: generator.random(s, np.float32) for n, s in expected_shapes(architecture).items()}
    return Scores(architecture, tensors | {"layers": np.array(influence, np.float32)})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0+1+3-7", [0, 1, 3, 4, 5, 6, 7]),
        ("3-3", [3]),
        (" 8 - 10 + 2 ", [8, 9, 10, 2]),
        ("24", None),
        ("-3", None),
        ("1+", None),
        ("0+a", None),
        ("1e9", None),
    ],
)
def test_lists_of_numbers(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize(("text", "words"), [("7-3", "'7-3' in '7-3' runs backwards"), ("1+0-999999999", "too many")])
def test_lists_that_are_none(text, words):
    with pytest.raises(InputError, match=words):
        numbers(text)


@pytest.mark.parametrize("source", [DENSE, HYBRID], ids=["dense", "hybrid"])
def test_listed_layers_stay_in_every_spelling(source, tmp_path):
    """On the command line, in a recipe's key=value, in a YAML file and in Python."""
    made = plan(scores(source, range(9)), parse.sizes("layers=0+1+3-5,ffn=7"))
    assert (made.keep["layers"], made.target.ffn_hidden_size) == ([0, 1, 3, 4, 5], 7)
    assert made.target == source.keep_layers([0, 1, 3, 4, 5]).replace(ffn_hidden_size=7)
    values = {"name": "pico", "teacher": "t", "data": {"train": "a", "test": "b"}, "keep": {"layers": "0+1+3-5"}}
    job = build(Job, values)
    assert job.keep == {"layers": [0, 1, 3, 4, 5]} == job.override(["keep.layers=0-1+3-5"]).keep


def test_a_searched_plan_keeps_the_listed_layers(tmp_path):
    scores(DENSE, range(9)).save(tmp_path / "scores.safetensors")
    search = Search(params=str(DENSE.keep_layers(range(4)).parameters() - 1))
    made = run_plan(tmp_path / "scores.safetensors", parse.sizes("layers=0+2-4"), search).plan
    assert made.keep["layers"] == [0, 2, 3, 4]
    assert made.target.parameters() < DENSE.keep_layers(range(4)).parameters()


INFLUENCE = [5, 1, 2, 8, 9, 4, 3, 1, 7]  # M-M*-M-M*: of M 0 2 5 7, of - 1 4 6, of * 3 8


def test_layers_of_each_kind_are_ranked_among_their_kind():
    s = scores(HYBRID, INFLUENCE)
    keep = parse.sizes("mamba_layers=2,attention_layers=1,mlp_layers=2,ffn=7")
    made = plan(s, keep)
    assert made.keep["layers"] == [0, 3, 4, 5, 6]
    assert (made.target.hybrid_pattern, made.target.ffn_hidden_size) == ("M*-M-", 7)
    assert made.target.parameters() == student_architecture(HYBRID, keep).parameters()
    assert plan(s, {"attention_layers": 1}).keep["layers"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert plan(s, {"mamba_layers": 2}, least=True).keep["layers"] == [1, 2, 3, 4, 6, 7, 8]
    assert "layers" not in plan(s, {"mamba_layers": 4, "ffn": 7}).keep  # the kind is whole
    by_chance = {tuple(random_plan(HYBRID, {"mamba_layers": 1}, seed=seed).keep["layers"]) for seed in range(20)}
    assert len(by_chance) == 4


def test_a_kind_that_stays_whole_needs_no_scores():
    s = scores(HYBRID, INFLUENCE)
    del s.tensors["layers"]
    assert plan(s, {"mamba_layers": 4, "ffn": 7}).target == HYBRID.replace(ffn_hidden_size=7)
    with pytest.raises(InputError, match="layers"):
        plan(s, {"mamba_layers": 3})


@pytest.mark.parametrize(
    ("source", "keep", "words"),
    [
        (DENSE, {"mamba_layers": 2}, "has no 'mamba_layers' to cut; it is no hybrid; give layers"),
        (
            HYBRID.keep_layers([0, 1]),
            {"attention_layers": 1},
            "no 'attention_layers' to cut; it has mamba_layers, mlp_",
        ),
        (HYBRID, {"mamba_layers": 5}, "mamba_layers=5 is not legal; legal are whole numbers from 1 to 4"),
        (HYBRID, {"mlp_layers": 0}, "mlp_layers=0 is not legal"),
        (HYBRID, {"mlp_layers": [1, 4]}, r"mlp_layers=\[1, 4\] is not legal"),
        (HYBRID, {"mlp_layers": 1, "layers": [0, 1]}, "layers and mlp_layers are both given"),
        (
            HYBRID,
            {"layers": 4},
            r"list the layers that stay, .*; it has mamba_layers=4, attention_layers=2, mlp_layers=3",
        ),
        (HYBRID, {"layers": [0, 9]}, "legal are layer numbers from 0 to 8"),
        (HYBRID, {"ffn": [3, 4]}, r"ffn=\[3, 4\] is not legal"),
    ],
)
def test_refused(source, keep, words):
    with pytest.raises(InputError, match=words):
        student_architecture(source, keep)


def test_a_kind_is_not_ranked_by_another_criterion():
    with pytest.raises(InputError, match="mamba_layers is ranked by block_influence alone, not by 'loss'"):
        plan(scores(HYBRID, INFLUENCE), {"mamba_layers": 2}, depth="loss")


def test_rounds_of_each_kind():
    keep = {"mamba_layers": 1, "mlp_layers": 2}
    assert round_sizes(HYBRID, keep, 3) == [
        {"mamba_layers": 3, "mlp_layers": 3},
        {"mamba_layers": 2, "mlp_layers": 2},
        keep,
    ]
