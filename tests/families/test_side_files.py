"""What of a model's folder goes into a student's, and how a tokenizer is loaded: never by code of that folder."""

from __future__ import annotations

import json
import os

import pytest
from pico import pico_llama
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.families.side_files import TOKENIZER, copy_side_files, without_code
from nemo_minitron.families.tokenizer import largest_id, open_tokenizer, tokenizer_files
from nemo_minitron.families.tokenizer_config import COMMON, plain_config
from nemo_minitron.pruning import prune

TEXTS = [f"the model number {i} reads {i * 7} words and ends." for i in range(40)]
COPIED = [
    "LICENSE", "LICENSE.txt", "Notice.md", "USE_POLICY.md", "additional_chat_templates/tool.jinja",
    "chat_template.jinja", "tekken.json", "tokenizer.model.v3", "special_tokens_map.json", "qwen.tiktoken",
]  # fmt: skip
LEFT = [
    "params.json", "hf_quant_config.json", "adapter_config.json", "modules.json", "modeling_llama.py", "tokenizer.py",
    "tokenization_x.py", "license.py", "README.md", "notes.txt", "consolidated.00.pth", "minitron_plan.json",
    "model.safetensors.index.json.bak", "additional_chat_templates/code.py",
]  # fmt: skip


@pytest.fixture
def teacher(tmp_path):
    folder = pico_llama(tmp_path / "teacher")
    save_tokenizer(folder, TEXTS, 400)
    (folder / "additional_chat_templates").mkdir()
    for name in COPIED + LEFT:
        (folder / name).write_text(name if name != "special_tokens_map.json" else "{}")
    return folder


def cut(teacher, student):
    source = from_hf(teacher)
    plan = PrunePlan(source=source, target=source.replace(num_layers=2), keep={"layers": [0, 1]})
    return prune(teacher, plan, student)


def change(file, **values):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def test_what_a_student_gets(teacher, tmp_path):
    own = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    student = cut(teacher, tmp_path / "student")
    found = {str(file.relative_to(student)) for file in student.rglob("*") if file.is_file()}
    assert found == {*COPIED, *own, "model.safetensors", "minitron_plan.json"}


def test_configs_name_no_code(teacher, tmp_path):
    change(teacher / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    change(teacher / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenizer.X", None]}, tokenizer_class="X")
    student = cut(teacher, tmp_path / "student")
    assert "auto_map" not in json.loads((student / "config.json").read_text())
    values = json.loads((student / "tokenizer_config.json").read_text())
    assert "auto_map" not in values
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert without_code({"auto_map": 1, "tokenizer_class": "NoSuchTokenizer", "a": 2}) == {"a": 2}


def test_a_link_out_of_the_folder_is_refused(teacher, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("not yours")
    (teacher / "LICENSE").unlink()
    (teacher / "LICENSE").symlink_to(secret)
    with pytest.raises(InputError, match=r"LICENSE' is a symbolic link out of its folder, to '.*secret'"):
        cut(teacher, tmp_path / "student")
    assert not (tmp_path / "student").exists()
    (teacher / "LICENSE").unlink()
    (teacher / "LICENSE").symlink_to("chat_template.jinja")  # within the folder
    (teacher / "notes.txt").unlink()
    (teacher / "notes.txt").symlink_to(secret)  # is not copied, whatever it is
    assert (cut(teacher, tmp_path / "student") / "LICENSE").read_text() == "chat_template.jinja"
    assert not (tmp_path / "student" / "LICENSE").is_symlink()
    (teacher / "LICENSE").unlink()
    (teacher / "LICENSE").symlink_to("gone")
    with pytest.raises(InputError, match="where nothing is"):
        cut(teacher, tmp_path / "other")
    (teacher / "LICENSE").unlink()
    templates = teacher / "additional_chat_templates"
    os.rename(templates, tmp_path / "elsewhere")
    templates.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"tool\.jinja' is a symbolic link out"):
        cut(teacher, tmp_path / "other")


def test_the_hubs_cache_is_made_of_links(teacher, tmp_path):
    """`snapshots/REVISION/NAME` -> `../../blobs/DIGEST`: what hub ids resolve to."""
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in teacher.rglob("*") if file.is_file())):
        os.rename(file, cache / "blobs" / str(number))
        name = file.relative_to(teacher)
        (snapshot / name).symlink_to(os.path.relpath(cache / "blobs" / str(number), (snapshot / name).parent))
    student = cut(snapshot, tmp_path / "student")
    assert {str(file.relative_to(student)) for file in student.rglob("*")} >= set(COPIED)
    assert not any(file.is_symlink() for file in student.rglob("*"))
    assert len(tokenizer_files(snapshot)) == 8
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(tmp_path / "student" / "config.json")
    with pytest.raises(InputError, match="symbolic link out"):
        cut(snapshot, tmp_path / "other")


# -- loading -------------------------------------------------------------------------------------------
CODE = """open({!r}, 'w').write('ran')
from transformers import PreTrainedTokenizerFast
class X(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("class_", ["X", "LlamaTokenizerFast", None])
def test_code_of_a_tokenizer_never_runs(teacher, tmp_path, monkeypatch, class_):
    """Not even where somebody says yes: transformers asks on the terminal unless it is told no."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    expected = open_tokenizer(teacher)(TEXTS[0], add_special_tokens=False)["input_ids"]
    (teacher / "tokenizer.py").write_text(CODE.format(str(tmp_path / "ran")))
    change(teacher / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenizer.X", "tokenizer.X"]})
    change(teacher / "config.json", auto_map={"AutoTokenizer": ["tokenizer.X", "tokenizer.X"]})
    if class_:
        change(teacher / "tokenizer_config.json", tokenizer_class=class_)
    assert open_tokenizer(teacher)(TEXTS[0], add_special_tokens=False)["input_ids"] == expected
    (teacher / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"code of a model's folder is never run|gives no tokenizer"):
        open_tokenizer(teacher)
    assert not (tmp_path / "ran").exists()


def test_a_class_that_transformers_does_not_have(teacher):
    """As transformers 5 writes it: another class, and extra special tokens in a list."""
    before = open_tokenizer(teacher)
    extra = {"extra_special_tokens": ["the"], "is_local": True, "backend": "tokenizers"}
    change(teacher / "tokenizer_config.json", tokenizer_class="TokenizersBackend", **extra)
    after = open_tokenizer(teacher)
    assert after(TEXTS[0])["input_ids"][0] == after.convert_tokens_to_ids("the")
    assert after.additional_special_tokens == ["the"]
    assert (after.eos_token, after.eos_token_id) == (before.eos_token, before.eos_token_id)
    assert after.decode(after(TEXTS[1])["input_ids"]) == TEXTS[1]


def test_the_common_classes_are_transformers():
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for name in COMMON[1:]:
        assert tokenizer_class_from_name(f"{name}Fast") is not None, name
    kept = {"tokenizer_class": "LlamaTokenizerFast", "a": 1}
    assert plain_config(kept, True) == kept
    assert plain_config({"tokenizer_class": "X"}, False) == {"tokenizer_class": "X"}  # no tokenizer.json: it is refused


def test_the_largest_id_where_there_are_holes(teacher):
    values = json.loads((teacher / "tokenizer.json").read_text())
    token = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
    values["model"]["vocab"][token] = 5000
    (teacher / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = open_tokenizer(teacher)
    assert largest_id(tokenizer) == 5000
    assert len(tokenizer) < 1000


def test_a_damaged_config_is_one_sentence(teacher, tmp_path):
    (teacher / "tokenizer_config.json").write_text("[1]")
    for attempt in (lambda: open_tokenizer(teacher), lambda: copy_side_files(teacher, tmp_path, TOKENIZER)):
        with pytest.raises(InputError, match="holds a list"):
            attempt()
