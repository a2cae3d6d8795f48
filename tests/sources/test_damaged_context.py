"""The context of a NeMo checkpoint that is damaged, or grows without bounds."""

import json

import mutations_of_files as mutations
import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.sources.context import read_context, tokenizer_folder


@pytest.fixture
def context(tmp_path):
    """What NeMo writes of a model, as far as it is read."""

    def leaf(name, value):
        return [f"Attr(name='{name}')", {"type": "leaf", "value": value, "paths": []}]

    def ref(name, key):
        return [f"Attr(name='{name}')", {"type": "ref", "key": key}]

    objects = {
        "root": {"type": {"name": "Config"}, "items": [ref("model", "model")], "metadata": {"key": "m"}},
        "model": {
            "type": {"name": "Config"}, "items": [ref("config", "config"), ref("tokenizer", "tokenizer")],
            "metadata": {"key": "m"},
        },
        "config": {
            "type": {"name": "Config"}, "items": [leaf("num_layers", 2), ref("many", "many")], "metadata": {"key": "m"}
        },
        "many": {"type": {"name": "list"}, "items": [leaf("Index(index=0)", 1), leaf("Index(index=1)", 2)]},
        "tokenizer": {
            "type": {"name": "Config"}, "items": [leaf("pretrained_model_name", "a/b")], "metadata": {"key": "m"}
        },
        "m": {"items": [["Attr(name='fn_or_cls')", {"type": "pyref", "module": "nemo", "name": "LlamaModel"}]]},
    }  # fmt: skip
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "io.json").write_text(json.dumps({"objects": objects, "root": {"key": "root"}}))
    (folder / "model.yaml").write_text("config:\n  num_layers: 2\n  made: 2024-01-02\n")
    return folder


def test_damaged_contexts(context):
    def read(folder):
        return read_context(folder), tokenizer_folder(folder.parent)

    assert read(context)[0].config["many"] == [1, 2]
    refused = []
    for name in ("io.json", "model.yaml"):
        whole = (context / name).read_bytes()
        damaged = list(mutations.of_bytes(whole, 100, seed=name))
        damaged += mutations.of_values(json.loads(whole), 200, seed=name) if name == "io.json" else [mutations.DEEP]
        for data in damaged:
            (context / name).write_bytes(data)
            mutations.tries(read, context, refused)
        (context / name).write_bytes(whole)
    assert len(refused) > 100


def test_a_context_whose_date_is_none(context):
    (context / "model.yaml").write_text("config:\n  made: 2024-13-45\n")
    with pytest.raises(InputError, match=r"model\.yaml' cannot be read"):
        read_context(context)


def test_a_context_of_lists_in_lists_is_bounded(context):
    """Forty objects, each a list of the next one twice: as values they are two to the fortieth."""
    values = json.loads((context / "io.json").read_text())
    for i in range(40):
        item = {"type": "ref", "key": f"l{i + 1}"} if i < 39 else {"type": "leaf", "value": 1}
        items = [["Index(index=0)", item], ["Index(index=1)", item]]
        values["objects"][f"l{i}"] = {"type": {"name": "list"}, "items": items}
    values["objects"]["config"]["items"].append(["Attr(name='deep')", {"type": "ref", "key": "l0"}])
    (context / "io.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="more than 131072 values"):
        read_context(context)
