"""PrunePlan: only legal selections exist, and files give them back."""

import json
import math

import pytest
from test_architecture import smollm2

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.errors import InputError

SIZES = {"num_layers": 3, "hidden_size": 6, "ffn_hidden_size": 8, "num_attention_heads": 6, "head_dim": 2}
SOURCE = smollm2(**SIZES, vocab_size=11)


def each(indices):
    """The same indices in each of the three layers."""
    return {layer: list(indices) for layer in range(3)}


def plan(keep, **sizes):
    return PrunePlan(source=SOURCE, target=SOURCE.replace(**sizes), keep=keep)


def small():
    keep = {"layers": [0, 2], "hidden": [1, 2, 5]}
    keep |= {"ffn": {0: [0, 7], 2: [3, 4]}, "heads": {0: [0, 3, 4], 2: [1, 2, 5]}}
    return plan(keep, num_layers=2, hidden_size=3, ffn_hidden_size=2, num_attention_heads=3)


def test_round_trip(tmp_path):
    made = small()
    made.model_digest, made.notes = "ab", {"seed": 1}
    made.save(tmp_path / "plan.json")
    loaded = PrunePlan.load(tmp_path / "plan.json")
    assert loaded == made
    assert loaded.keep["ffn"][2] == [3, 4]
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_identity_is_the_selection():
    a, b = small(), small()
    b.notes = {"scores": "x"}
    assert a.digest == b.digest
    b.keep["ffn"][2] = [3, 5]
    assert a.digest != b.digest


def test_reading_indices():
    made = small()
    assert made.kept_layers == [0, 2]
    assert made.indices("ffn", 2) == [3, 4]
    assert made.indices("hidden") == [1, 2, 5]
    assert made.indices("query_groups", 2) is None
    assert plan({}).kept_layers == [0, 1, 2]


@pytest.mark.parametrize(
    ("keep", "sizes", "message"),
    [
        ({"hiden": [0]}, {}, "did you mean 'hidden'"),
        ({"hidden": [0, 6]}, {"hidden_size": 2}, "index 6 is out of range; the source has 0 to 5"),
        ({"hidden": [-1, 3]}, {"hidden_size": 2}, "index -1 is out of range"),
        ({"hidden": [3, 3]}, {"hidden_size": 2}, "sorted and none repeated"),
        ({"hidden": [3, 1]}, {"hidden_size": 2}, "sorted and none repeated"),
        ({"hidden": [1, 3]}, {"hidden_size": 3}, "2 indices are kept, the target has 3"),
        ({"hidden": [1.0, 3]}, {"hidden_size": 2}, "whole numbers"),
        ({"hidden": [True, 3]}, {"hidden_size": 2}, "whole numbers"),
        ({"hidden": {0: [1]}}, {"hidden_size": 1}, "whole numbers"),
        ({}, {"hidden_size": 2}, "keeps no indices of 'hidden'"),
        ({}, {"head_dim": 4}, "cannot change head_dim"),
        ({}, {"tied_embeddings": False}, "cannot change tied_embeddings"),
        ({"ffn": {0: [1], 1: [1]}}, {"ffn_hidden_size": 1}, "one list for each kept layer"),
        ({"ffn": [1]}, {"ffn_hidden_size": 1}, "one list for each kept layer"),
        ({"layers": [0], "ffn": each([1])}, {"ffn_hidden_size": 1, "num_layers": 1}, "each kept layer"),
        # heads 0 and 1 are of group 0: group 1 would have none
        ({"heads": each([0, 1, 4])}, {"num_attention_heads": 3}, "each kept query group"),
        ({"query_groups": each([0, 2])}, {"num_query_groups": 2}, "must list the heads"),
        (
            {"query_groups": each([0, 2]), "heads": each([0, 1, 2, 3])},
            {"num_query_groups": 2, "num_attention_heads": 4},
            "each kept query group",
        ),
    ],
)
def test_illegal_selections(keep, sizes, message):
    with pytest.raises(InputError, match=message):
        plan(keep, **sizes)


def test_whole_query_groups():
    keep = {"query_groups": each([0, 2]), "heads": each([0, 1, 4, 5])}
    assert plan(keep, num_query_groups=2, num_attention_heads=4).indices("heads", 1) == [0, 1, 4, 5]


def _without_source(values):
    del values["source"]


def _damage(change):
    values = small().as_dict()
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "{}", '{"version": 1}', "[" * 100_000,
        _damage(lambda v: v.update(version=2)),
        _damage(_without_source),
        _damage(lambda v: v.update(source=3)),
        _damage(lambda v: v.update(keep=[1])),
        _damage(lambda v: v.update(keep={"ffn": {"x": [1]}})),
        _damage(lambda v: v["keep"].update(layers=3)),
        _damage(lambda v: v["keep"].update(layers=None)),
        _damage(lambda v: v["keep"].update(hidden="012")),
        _damage(lambda v: v["source"].update(hidden_size=math.nan)),
        _damage(lambda v: v["source"].update(unknown=1)),
        _damage(lambda v: v.update(notes="x")),
        _damage(lambda v: v.update(model_digest=3)),
    ],
)  # fmt: skip
def test_illegal_files(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError):
        PrunePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("size", [10**6, 10**12, 10**30])
@pytest.mark.parametrize("field", ["num_layers", "num_moe_experts"])
def test_a_plan_of_a_million_layers_costs_nothing(tmp_path, field, size):
    """A few hundred bytes that speak of a model which would not fit into memory."""
    values = small().as_dict()
    values |= {"keep": {}, "target": values["source"]}
    for name in ("source", "target"):
        values[name] = values[name] | {"num_moe_experts": 4, "mlp_bias": False, field: size}
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"{field} is {size}; legal are 1 to 10000"):
        PrunePlan.load(tmp_path / "plan.json")


def test_a_plan_of_many_layers_is_checked_in_linear_time(tmp_path):
    """Mutation: the kept layers listed anew for each layer take hours here."""
    values = small().as_dict()
    layers = values["source"] | {"num_layers": 10_000}
    ffn = {str(n): [0, 1] for n in range(10_000)}
    values |= {"source": layers, "target": layers | {"ffn_hidden_size": 2}, "keep": {"ffn": ffn}}
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert len(PrunePlan.load(tmp_path / "plan.json").keep["ffn"]) == 10_000


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        PrunePlan.load(tmp_path / "plan.json")
    with pytest.raises(InputError, match="folder"):
        PrunePlan.load(tmp_path)
