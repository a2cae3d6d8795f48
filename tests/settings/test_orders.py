"""What a command tells the processes of a stage comes to them as it was; what is no order is refused."""

import json
from pathlib import Path

import pytest

from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.typed import plain
from nemo_minitron.errors import InputError
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.finetuning import Finetuning
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import (
    ORDERS,
    CacheOrder,
    CompensateOrder,
    DistillOrder,
    EstimateOrder,
    FinetuneOrder,
    PruneOrder,
    RotateOrder,
    read_order,
)
from nemo_minitron.settings.recipe import Distillation

HERE, LAYOUT = Path("/models/teacher"), Layout(tp=2, dp=3, sp=True)
CALIBRATION = Calibration(samples=3, axes=("ffn", "heads"), depth=("loss",), depth_sizes=(1, 2))
EVERY = (
    EstimateOrder(HERE, Path("text"), Path("work"), CALIBRATION, LAYOUT),
    PruneOrder(HERE, Path("plan.json"), Path("out"), Path("solved")),
    PruneOrder(HERE, Path("plan.json"), Path("out")),
    CompensateOrder(HERE, {Path("p"): Path("a"), Path("\udce9"): Path("b")}, Path("text"), 1, 9, CALIBRATION, LAYOUT),
    RotateOrder(HERE, Path("text"), Path("sums.npy"), CALIBRATION, LAYOUT),
    CacheOrder(HERE, Path("text"), Path("out"), LAYOUT, 2),
    CacheOrder(Path("caf\udce9"), Path("text"), Path("out"), LAYOUT, 2),  # a name that is no UTF-8
    DistillOrder(HERE, None, Path("t"), Path("h"), Path("out"), Path("i"), Distillation(lm_weight=0.25), LAYOUT),
    DistillOrder(HERE, HERE, Path("t"), Path("h"), Path("o"), Path("i"), Distillation(), LAYOUT, 7, Path("plan.json")),
    FinetuneOrder(HERE, Path("data"), Path("out"), Finetuning(), LAYOUT),
    CompensateOrder(HERE, {Path("p"): Path("a")}, Path("text"), "auto", 9, CALIBRATION, LAYOUT, 2, 4, fill_gaps=True),
)  # fmt: skip


@pytest.mark.parametrize("order", EVERY, ids=lambda order: order.stage)
def test_an_order_comes_as_it_was(order, tmp_path):
    """Also in type: a tuple is a tuple again, a path a path. Mutation: `listed` without `tuple`."""
    write_json(tmp_path / "order.json", plain(order))
    assert read_order(order.stage, tmp_path / "order.json") == order


def test_every_stage_is_tried_here():
    assert {order.stage for order in EVERY} == set(ORDERS)


def test_processes_and_places():
    assert [order.processes for order in EVERY] == [6, 1, 1, 6, 6, 6, 6, 6, 6, 6, 6]
    assert [str(order.place) for order in EVERY] == [
        "work",
        "out",
        "out",
        "a",
        "sums.npy",
        "out",
        "out",
        "out",
        "o",
        "out",
        "a",
    ]


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("cache", {"modle": "x"}, "'modle', not a key that is known here; did you mean 'model'?"),
        ("cache", {"micro_batch_size": None}, "'micro_batch_size' is None, not a whole number"),
        ("cache", {"micro_batch_size": True}, "'micro_batch_size' is True, not a whole number"),
        ("cache", {"layout": {"tq": 2}}, "'layout' is 'tq', not a key that is known here; did you mean 'tp'?"),
        ("cache", {"layout": {"tp": "2"}}, "'layout.tp' is '2', not a whole number"),
        ("cache", {"out": 3}, "'out' is 3, not a path"),
        ("estimate", {"calibration": {"axes": "ffn"}}, "'calibration.axes' is 'ffn', not a list"),
        ("estimate", {"calibration": {"samples": 0}}, "samples is 0; the nearest legal value is 1"),
        ("compensate", {"plans": ["a"]}, "'plans' is ['a'], not an object"),
        ("caches", {}, "there is no stage 'caches'; did you mean 'cache'?"),
    ],
)
def test_what_is_no_order_is_refused(stage, change, words, tmp_path):
    values = next((plain(order) for order in EVERY if order.stage == stage), {})
    (tmp_path / "order.json").write_text(json.dumps(values | change))
    with pytest.raises(InputError) as caught:
        read_order(stage, tmp_path / "order.json")
    assert words in str(caught.value)


def test_a_key_that_is_missing_is_named(tmp_path):
    values = plain(EVERY[5])
    del values["out"]
    write_json(tmp_path / "order.json", values)
    with pytest.raises(InputError, match=r"the order '.*order.json' .* not an object with 'out'"):
        read_order("cache", tmp_path / "order.json")


def test_its_numbers_are_plain():
    """NeMo writes what it trains with into a checkpoint's context, and leaves that empty if it finds another class."""
    assert type(Distillation().sequence_length) is not int  # a default that may give way
    for order in EVERY:
        for group in (value for value in vars(order).values() if hasattr(value, "__dataclass_fields__")):
            assert {type(value) for value in vars(group).values()} <= {int, float, str, bool, tuple, dict, type(None)}
