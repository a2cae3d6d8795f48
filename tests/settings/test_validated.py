"""Numbers of recipes and options that are none, negative or absurd, refused by their name, in every group."""

import dataclasses
import json
import math

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.job import Calibration, Data, Distillation, Evaluation, Job, Layout
from nemo_minitron.schema import MOST, SEEDS, TOKENS
from nemo_minitron.settings.cutting import Cutting
from nemo_minitron.settings.finetuning import Finetuning
from nemo_minitron.settings.generation import Generation
from nemo_minitron.settings.search import Search

GROUPS = (Calibration, Cutting, Distillation, Evaluation, Finetuning, Generation, Search)
JOB = Job("pico", "teacher", Data("train", "test"))


def fields(kind):
    return [(group, field.name) for group in GROUPS for field in dataclasses.fields(group) if field.type == kind]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize(("group", "name"), fields("float"), ids=lambda value: getattr(value, "__name__", value))
def test_numbers_are_finite_and_not_negative(group, name, value):
    with pytest.raises(InputError, match=f"^{name} is {value}"):
        group(**{name: value})


@pytest.mark.parametrize("value", [-1, 2**64, 10**5000], ids=["negative", "65 bits", "endless"])
@pytest.mark.parametrize(("group", "name"), fields("int"), ids=lambda value: getattr(value, "__name__", value))
def test_counts_can_be(group, name, value):
    with pytest.raises(InputError, match=f"^(search.)?{name} "):
        group(**{name: value})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("distillation.learning_rate=NaN", "learning_rate is nan; it must be a finite number"),
        ("distillation.min_learning_rate=-1e-5", "min_learning_rate is -1e-05; it must be at least 0"),
        ("distillation.weight_decay=-0.1", "weight_decay is -0.1; it must be at least 0"),
        ("distillation.temperature=Infinity", "temperature is inf; it must be a finite number"),
        ("distillation.top_k=2.5", "'distillation.top_k' is 2.5; it must be a whole number"),
        ("distillation.seed=18446744073709551616", f"seed is 18446744073709551616; the nearest legal value is {SEEDS}"),
        ("calibration.seed=4294967296", f"the nearest legal value is {SEEDS}"),
        ("seed=18446744073709551616", f"the nearest legal value is {SEEDS}"),
        ("calibration.samples=99999999999", f"samples is 99999999999; the nearest legal value is {MOST}"),
        ("distillation.tokens=9999999999999999", f"the nearest legal value is {TOKENS}"),
        ("cutting.ridge=NaN", "ridge is nan; it must be a finite number"),
        ("cutting.ridge=best", "ridge is 'best'; it must be a number, or auto"),
        ("cutting.ridge=true", "'cutting.ridge' is True; it must be a number"),
        (f"distillation.learning_rate={10**400}", "'distillation.learning_rate' is a whole number of 1329 bits"),
        ("rounds=99999999999", "rounds is 99999999999"),
    ],
)
def test_in_a_recipe(setting, words):
    with pytest.raises(InputError, match=words):
        JOB.override([setting])


@pytest.mark.parametrize(("written", "value"), [("auto", "auto"), ("0.03", 0.03), ("1", 1.0)])
def test_a_number_or_a_name(written, value):
    assert JOB.override([f"cutting.ridge={written}"]).cutting.ridge == value


def test_the_largest_are_legal():
    Calibration(seed=SEEDS, samples=MOST)
    assert Distillation(tokens=TOKENS, seed=SEEDS, weight_decay=0.0, min_learning_rate=0.0).steps == TOKENS // 4096
    assert json.loads(json.dumps(JOB.as_dict()))["seed"] == 0


@pytest.mark.parametrize("name", ["tp", "pp", "vp", "cp", "ep", "dp"])
def test_layouts(name):
    from pico import SIZES

    from nemo_minitron.families import from_hf

    model = from_hf(SIZES | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(InputError, match=f"^{name} is {2**64}; it must be a whole number of at least 1, at most"):
        Layout(**{name: 2**64}).check(model)
