"""Recipes as YAML and JSON: the same job as in Python; what is wrong is refused in a sentence."""

import json
from pathlib import Path

import pytest
import yaml

from nemo_minitron.cli.find import find, names
from nemo_minitron.errors import InputError
from nemo_minitron.families import resolve
from nemo_minitron.schema import asked_for

TEXT = """
name: pico
teacher: models/teacher
data: {train: train.jsonl, test: test.jsonl}
keep:
  ffn: 64
distillation:
  learning_rate: 3e-4
  tokens: 2000
layout:
  dp: 2
  sp: true
evaluation:
  prompts: [one, two]
"""


def read(folder, text, name="mine.yaml"):
    (folder / name).write_text(text)
    return find(str(folder / name))


@pytest.mark.parametrize("name", names())
def test_every_recipe_that_is_shipped_is_itself_as_a_file(tmp_path, name):
    """Plain data of each recipe, written by other code and read by ours."""
    job = find(name)
    assert read(tmp_path, yaml.safe_dump(json.loads(json.dumps(job.as_dict())))) == job
    assert read(tmp_path, json.dumps(job.as_dict()), "mine.json") == job


def test_what_is_written_and_what_is_left_out(tmp_path):
    job = read(tmp_path, TEXT)
    assert (job.keep, job.layout.dp, job.layout.sp) == ({"ffn": 64}, 2, True)
    assert job.distillation.learning_rate == 3e-4
    assert job.evaluation.prompts == ("one", "two")
    assert not asked_for(job.distillation.global_batch_size)
    assert asked_for(read(tmp_path, TEXT + "calibration: {samples: 1024}\n").calibration.samples)
    assert job == read(tmp_path, TEXT, "mine.yml")


def test_the_recipe_of_a_run_folder_is_fed_back(tmp_path):
    """There every setting is written out; a default of it was not asked for."""
    job = read(tmp_path, TEXT)
    values = json.dumps(job.as_dict())
    assert asked_for(read(tmp_path, values, "recipe.json").calibration.samples)
    (tmp_path / "manifest.json").write_text("{}")
    again = find(str(tmp_path / "recipe.json"))
    assert again == job
    assert not asked_for(again.calibration.samples)
    assert asked_for(again.distillation.tokens)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT + "name: other\n", "'name' occurs twice, with different values"),
        (TEXT.replace("  tokens", "  tokns"), "no key 'distillation.tokns'; did you mean 'tokens'"),
        (TEXT.replace("2000", "many"), "'distillation.tokens' is 'many'; it must be a whole number"),
        (TEXT.replace("2000", "2.5"), "'distillation.tokens' is 2.5; it must be a whole number"),
        (TEXT.replace("sp: true", "sp: 1"), "'layout.sp' is 1; it must be true or false"),
        (TEXT.replace("name: pico", "name: 2026-11-28"), "'name' is .*it must be a text"),
        (TEXT.replace("teacher: models/teacher", ""), "the recipe lacks 'teacher'"),
        (TEXT.replace("dp: 2", "dp: [2"), "line 12 is no YAML"),
        (TEXT.replace("ffn: 64", "1: 64"), "the key 1 is no text"),
        (TEXT.replace("ffn: 64", "? [a, b]\n  : 64"), r"the key \['a', 'b'\] is no text"),
        ("- a\n- b\n", "must be a group of settings"),
        ("", "the recipe is empty; it must be a group of settings: name, teacher, data"),
        ("a: &x [1]\nb: [*x, *x]\n", "has an alias"),
        ("a: !!python/object/apply:os.system ['true']", "no YAML: could not determine a constructor"),
        ("a: " + "[" * 5000, "is nested too deep|no YAML"),
        ("a: \x00", "cannot be read"),
    ],
)
def test_refused(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_json_that_is_wrong(tmp_path):
    with pytest.raises(InputError, match="occurs twice"):
        read(tmp_path, '{"name": "a", "name": "b"}', "mine.json")


@pytest.mark.parametrize("name", ["none.yaml", "none.json", "none.py"])
def test_no_such_file(tmp_path, name):
    with pytest.raises(InputError, match="does not exist"):
        find(str(tmp_path / name))


def test_files_of_the_demo_are_found_from_any_folder(tmp_path, monkeypatch):
    """Those of the current folder first; a missing one keeps its name, and the refusal says what makes it."""
    from nemo_minitron.recipes.smollm2_135m import demo

    monkeypatch.chdir(tmp_path)
    assert Path(demo("prepare.py")).is_absolute()
    assert Path(demo("prepare.py")).is_file()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "prepare.py").touch()
    assert demo("prepare.py") == "demo/prepare.py"
    (tmp_path / "demo" / "smollm2-135m-instruct").mkdir()  # a recipe asks at each call, whoever loaded it before
    assert find("smollm2_135m_to_108m_width").teacher == "demo/smollm2-135m-instruct"
    monkeypatch.chdir("/")
    assert find("smollm2_135m_to_108m_width").teacher != "demo/smollm2-135m-instruct"
    monkeypatch.chdir(tmp_path)
    assert demo("nothing") == "demo/nothing"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="`make venv`, in a clone"):
        resolve(demo("nothing"))
