"""NeMo's classes by the names in the families' tables; `register` takes each of them from `nemo.collections.llm`."""

import ast
import sysconfig
from pathlib import Path

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.families import FAMILIES, family_of_nemo

LLM = Path(sysconfig.get_paths()["purelib"]) / "nemo" / "collections" / "llm"


def names(folder):
    """What the files of a folder define, and the imports of its `__init__.py`; NeMo itself is not loaded."""
    exported = {
        name.name
        for node in ast.parse((folder / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    files = [ast.parse(file.read_text()) for file in folder.rglob("*.py")]
    return exported, {node.name for tree in files for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.skipif(not LLM.is_dir(), reason="NeMo is not installed here")
def test_nemo_has_each_familys_classes():
    exported, defined = names(LLM)
    assert {family.nemo_model for family in FAMILIES} <= exported
    assert {family.nemo_class for family in FAMILIES} <= defined


@pytest.mark.parametrize(
    "model_class", ["Gemma2Model", "Gemma3Model", "GPTOSSModel", "DeepSeekModel", "MambaModel", "T5Model"]
)
def test_a_checkpoint_of_a_class_that_nemo_builds_wrong_is_refused(model_class):
    with pytest.raises(InputError, match=f"NeMo checkpoints of '{model_class}' are not read; .*LlamaModel.*folder"):
        family_of_nemo(model_class, {})
