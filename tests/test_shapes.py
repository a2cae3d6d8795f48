"""Names of tensors end with their shape: each file names its letters, and docs/shapes.md says what they mean."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("distillation", "importance", "backend", "pruning", "megatron", "hosts")
FILES = [file for room in ROOMS for file in sorted((ROOT / "nemo_minitron" / room).rglob("*.py"))]
LEGEND = re.compile(r"^Shapes \(docs/shapes\.md\):(.*?)(?:\n\n|\Z)", re.S | re.M)
# `logits_NW`, `scratch_3NW`; a constant such as CHUNK_SIZE has no small letter in front.
SUFFIX = re.compile(r"[a-z0-9]_([A-Z0-9]*[A-Z][A-Z0-9]*)$")


def letters_of_table():
    return set(re.findall(r"^\| ([A-Z]) \|", (ROOT / "docs/shapes.md").read_text(), re.M))


def letters_used(tree):
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {letter for name in names if (match := SUFFIX.search(name)) for letter in match[1] if letter.isalpha()}


def letters_named(tree):
    legend = LEGEND.search(ast.get_docstring(tree) or "")
    return set(re.findall(r"\b[A-Z]\b", legend[1])) if legend else set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "nemo_minitron")))
def test_each_file_names_its_letters(file):
    tree = ast.parse(file.read_text())
    assert letters_used(tree) <= letters_named(tree) <= letters_of_table()


def test_the_check_sees_letters():
    tree = ast.parse('"""Shapes (docs/shapes.md): N tokens.\n\nB."""\ndef f(a_NW): CHUNK_SIZE, b_3N, x.c_R')
    assert letters_used(tree) == {"N", "W", "R"}
    assert letters_named(tree) == {"N"}
