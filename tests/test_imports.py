"""The import law (docs/architecture.md), read off the source; and what a light start may load."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemo_minitron"
LAW = (  # a room imports what stands above it, never what stands beside it; `nemo` is the import path of a NeMo user
    (
        "errors",
        "hybrid",
        "latents",
        "mixture",
        "layer_shapes",
        "architecture",
        "axes",
        "precisions",
        "costs",
        "schema",
        "lazy",
        "progress",
        "windows",
    ),
    ("artifacts",),
    ("families", "backend"),
    ("data", "sources"),
    ("importance", "search", "pruning", "distillation", "evaluation", "export"),
    ("settings",),
    ("megatron", "launch"),
    ("hosts",),
    ("nemo", "bridge", "commands"),
    ("job",),
    ("recipes",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(LAW) for room in rooms}
NEMO = ("nemo", "nemo_run", "lightning")
HOSTS = ("nemo", "bridge")
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


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} | {"recipes"}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms | files == FLOOR.keys()


def _arrows():
    """(importing file, imported file) of the package, as dotted names; a name of a package stands for its __init__."""
    trees = {_dotted(path): tree for path, tree in _modules()}
    for module, tree in trees.items():
        names = set(_imports(tree))
        deeper = {name.rpartition(".")[0] for name in names if name in trees}  # `from package import file`
        plain = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} - _whole(tree, trees)
        for name in names & trees.keys() - {module} - (deeper & plain):
            yield module, name


def _whole(tree, trees):
    """Packages from which something else than a file is imported."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {n.module for n in found if any(f"{n.module}.{alias.name}" not in trees for alias in n.names)}


def _dotted(path):
    parts = path.with_suffix("").parts
    return ".".join(("nemo_minitron", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _room_of(module):
    return module.split(".")[1] if "." in module else ""


def test_no_arrow_runs_up_or_sideways():
    def legal(module, name):
        here, there = _room_of(module), _room_of(name)
        # the files of the first floor may know each other
        return not here or not there or here == there or FLOOR[there] < max(FLOOR[here], 1)

    assert sorted({f"{a} imports {b}" for a, b in _arrows() if not legal(a, b)}) == []


def test_no_circle_of_files():
    """Also none that is closed by an import inside a function."""
    after = {}
    for module, name in _arrows():
        after.setdefault(module, set()).add(name)
    while True:  # takes away what imports nothing that is left
        free = {name for names in after.values() for name in names} - after.keys()
        left = {module: names - free for module, names in after.items()}
        left = {module: names for module, names in left.items() if names}
        if left == after:
            break
        after = left
    assert after == {}


def test_nemo_only_in_hosts():
    allowed = {"hosts/nemo": NEMO, "launch/executors.py": ("nemo_run",), "cli/nemo_run.py": ("nemo_run", "fiddle")}

    def applies(path):
        return not any(str(path).startswith(place) for place in allowed)

    assert _breaches(lambda _: NEMO, lambda path: applies(path) and _room(path) != "cli") == []
    assert _breaches(lambda _: NEMO, lambda path: applies(path) and _room(path) == "cli", inside_functions=False) == []


def test_bridge_only_in_its_host():
    assert _breaches(lambda _: ("megatron.bridge",), lambda path: not str(path).startswith("hosts/bridge")) == []


def test_a_host_is_asked_by_its_protocol():
    """All else goes through `hosts.host_of`: which host it is, is nobody's business."""
    hosts = tuple(f"nemo_minitron.hosts.{name}" for name in HOSTS)
    assert _breaches(lambda _: hosts, lambda path: _room(path) != "hosts") == []


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_are_blind_to_each_other(host):
    others = tuple(f"nemo_minitron.hosts.{name}" for name in HOSTS if name != host)
    assert _breaches(lambda _: others, lambda path: str(path).startswith(f"hosts/{host}")) == []


def test_megatron_only_where_models_run():
    allowed = ("importance", "distillation", "backend", "megatron", "hosts")
    of_files = Path("data/index_writer.py")  # they are Megatron's: its own class writes them
    assert _breaches(lambda _: ("megatron",), lambda path: _room(path) not in allowed and path != of_files) == []


def test_torch_not_in_plain_rooms():
    plain = (
        "errors", "architecture", "axes", "precisions", "costs", "artifacts", "families", "search", "pruning",
        "settings", "launch", "commands", "job", "recipes", "cli",
    )  # fmt: skip
    assert _breaches(lambda _: ("torch",), lambda path: _room(path) in plain) == []
    of_torch = (
        "bits.py",
        "checkpoint.py",
        "checkpoint_files.py",
        "converted.py",
    )  # they meet checkpoints, which torch writes
    assert _breaches(lambda _: ("torch",), lambda path: _room(path) == "sources" and path.name not in of_torch) == []


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


@pytest.mark.parametrize("package", ["importance", "importance.depth", "nemo", "bridge"])
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
        "from nemo_minitron.cli.find import find, names\nfor n in names(): find(n)",
        "from nemo_minitron.pruning import prune; from nemo_minitron.search import plan",
        "from nemo_minitron.hosts import host_of; host_of().worker",
    ],
)
def test_light_start(code):
    check = f"{code}\nimport sys\nheavy = [m for m in {HEAVY!r} if m in sys.modules]\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("host", HOSTS)
def test_a_worker_takes_signals_before_it_imports_anything(host):
    """SIGTERM, by which torchrun ends the ranks of one that died, is ignored until `main` has run its first lines."""
    code = f"import sys, nemo_minitron.hosts.{host}.worker; print([n for n in sys.modules if 'minitron' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = {name.split(".")[1] for name in ast.literal_eval(done.stdout) if name.startswith("nemo_minitron.")}
    assert rooms == {"hosts", "settings"}


def test_no_two_test_files_share_a_name():
    """pytest imports a test file by its name alone, so the second of a name is not collected in a whole run."""
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
