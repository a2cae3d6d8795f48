"""What a recipe says is a plain value: names are words, texts have no control characters, numbers fit."""

import json

import pytest

from nemo_minitron.cli.find import find
from nemo_minitron.errors import InputError
from nemo_minitron.settings.recipe import Data, Job
from nemo_minitron.settings.step import Step

VALUES = Job(name="a", teacher="t", data=Data("a.txt", "b.txt"), keep={"ffn": 64}).as_dict()
NAMES = (
    "../../x", "..", ".x", "", "a/b", "a b", "$(touch x)", "`touch x`", "a;b", "a\nb", "-x", "ä", "a" * 201, "\x1b[2J",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_plain_word(tmp_path, name):
    (tmp_path / "recipe.json").write_text(json.dumps(VALUES | {"name": name}))
    with pytest.raises(InputError, match="'name' is "):
        find(str(tmp_path / "recipe.json"))
    with pytest.raises(InputError, match="cannot name a folder"):
        Step(name=name)


def test_names_that_are_plain():
    for name in ("smollm2_135m", "Llama-3.1-8B", "7b", "a" * 200):
        assert str(Job.from_dict(VALUES | {"name": name}).folder()) == f"runs/{name}"


@pytest.mark.parametrize("key", ["teacher", "licence", "base_model", "learns_from", "depth"])
@pytest.mark.parametrize("text", ["a\0b", "a\x1b[2J", "a\nb", "\ud800", "\u202ea"])
def test_texts_have_no_control_characters(key, text):
    with pytest.raises(InputError, match=f"'{key}' is .*without control characters"):
        Job.from_dict(VALUES | {key: text})


def test_prompts_may_have_lines_and_nothing_else():
    prompts = {"evaluation": VALUES["evaluation"] | {"prompts": ["a\n\tb"]}}
    assert Job.from_dict(VALUES | prompts).evaluation.prompts == ("a\n\tb",)
    prompts["evaluation"]["prompts"] = ["a\x1b"]
    with pytest.raises(InputError, match=r"'evaluation\.prompts' is"):
        Job.from_dict(VALUES | prompts)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep": {"ffn": "64"}}, r"'keep\.ffn' is '64'; it must be a whole number"),
        ({"keep": {"layers": [0, "1"]}}, r"'keep\.layers' is '1'; it must be a whole number"),
        ({"keep": {"ffn": True}}, r"'keep\.ffn' is True; it must be a whole number"),
        ({"keep": "ffn"}, "'keep' is 'ffn'; it must be a group of settings: a name and a value each"),
        ({"base_model": {}}, "'base_model' is {}; it must be a text"),
        (
            {"distillation": {"learning_rate": 10**400}},
            "is a whole number of 1329 bits, which is too large",
        ),
        ({"teacher_config": {"a": json.loads("[" * 40 + "]" * 40)}}, "nested at most"),
    ],
)
def test_values_are_of_their_type(values, words):
    with pytest.raises(InputError, match=words):
        Job.from_dict(VALUES | values)


def test_an_override_that_is_nested_without_end():
    with pytest.raises(InputError):
        Job.from_dict(VALUES).override(["keep.ffn=" + "[" * 100_000])
