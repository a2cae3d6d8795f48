"""The import law (DESIGN.md, section 1), read off the source; and what a light start may load."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemo_minitron"
STAGES = ("importance", "search", "pruning", "distillation", "evaluation", "export")
NEMO = ("nemo", "nemo_run", "lightning")
HEAVY = ("torch", "nemo", "nemo_run", "lightning", "megatron", "transformers")


def _modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE), ast.parse(file.read_text())
    for file in sorted((PACKAGE.parent / "recipes").glob("*.py")):
        yield Path("recipes") / file.name, ast.parse(file.read_text())


def _imports(tree, inside_functions=True):
    """Dotted names of what a module imports; type-checking blocks do not count."""
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    if not inside_functions:
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        skipped |= {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _breaches(forbidden, applies, inside_functions=True):
    found = []
    for path, tree in _modules():
        if applies(path):
            for name in _imports(tree, inside_functions):
                if any(name == root or name.startswith(f"{root}.") for root in forbidden(path)):
                    found.append(f"{path} imports {name}")
    return sorted(set(found))


def _room(path):
    return path.parts[0] if len(path.parts) > 1 else path.stem


def test_nemo_only_in_nemo():
    assert _breaches(lambda _: NEMO, lambda path: _room(path) not in ("nemo", "cli")) == []
    assert _breaches(lambda _: NEMO, lambda path: _room(path) == "cli", inside_functions=False) == []


def test_megatron_only_where_models_run():
    allowed = ("importance", "distillation", "backend", "nemo")
    assert _breaches(lambda _: ("megatron",), lambda path: _room(path) not in allowed) == []


def test_torch_not_in_plain_rooms():
    plain = ("architecture", "axes", "job", "recipes", "cli", "families", "pruning", "search", "artifacts", "errors")
    assert _breaches(lambda _: ("torch",), lambda path: _room(path) in plain) == []


def test_stage_rooms_do_not_know_each_other():
    def siblings(path):
        return [f"nemo_minitron.{room}" for room in STAGES if room != _room(path)]

    assert _breaches(siblings, lambda path: _room(path) in STAGES) == []


def test_architecture_and_axes_import_no_room():
    rooms = [f"nemo_minitron.{path.name}" for path in PACKAGE.iterdir() if path.is_dir()]
    assert _breaches(lambda _: rooms, lambda path: _room(path) in ("architecture", "axes")) == []


def _relative(tree):
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def test_no_relative_imports():
    """`from ..search import plan` names no room that the law could see: names are written whole."""
    assert {str(path): lines for path, tree in _modules() if (lines := _relative(tree))} == {}


def test_the_law_sees_imports():
    """The walker itself: a breach in a function, a relative name and a plain import are all seen."""
    assert _relative(ast.parse("import a\ndef f():\n    from ..search import plan\n    from . import b")) == [3, 4]
    tree = ast.parse("def f():\n    from nemo.collections import llm\nimport torch.nn")
    assert "nemo.collections" in set(_imports(tree))
    assert "nemo.collections" not in set(_imports(tree, inside_functions=False))
    assert "torch.nn" in set(_imports(tree))


@pytest.mark.parametrize("package", ["importance", "importance.depth", "nemo"])
def test_no_module_takes_the_place_of_a_name(package):
    """A name that is looked up on first use must not be a submodule's: once that is imported, it would win."""
    names = importlib.import_module(f"nemo_minitron.{package}").__all__
    assert not {name for name in names if (PACKAGE / package.replace(".", "/") / f"{name}.py").exists()}


@pytest.mark.parametrize(
    "code",
    [
        "import nemo_minitron",
        "from nemo_minitron import cli; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0",
        "import nemo_minitron.nemo, nemo_minitron.backend, nemo_minitron.importance, nemo_minitron.job",
        "from nemo_minitron.job.find import find, names\nfor n in names(): find(n)",
        "from nemo_minitron.pruning import prune; from nemo_minitron.search import plan",
    ],
)
def test_light_start(code):
    check = f"{code}\nimport sys\nheavy = [m for m in {HEAVY!r} if m in sys.modules]\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
