"""README.md and docs/: every command in them exists, every name, every file; what is cheap is run.

A block of commands follows a comment that says what runs it, `<!-- run: FILES -->`, or why nothing does,
`<!-- not run: REASON -->`; in README.md a block may go without one, where its commands are known here. `text` blocks
are output.
"""

import ast
import re
import shlex
import sysconfig
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nemo_minitron.cli import app
from nemo_minitron.cli.find import find, is_model, names
from nemo_minitron.families import FAMILIES, from_hf
from nemo_minitron.search.sizes import student_architecture

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docker" / "README.md"]
LIBRARIES = Path(sysconfig.get_paths()["purelib"])
COMMANDS = typer.main.get_command(app).commands
NEMO_RUN = ("--dryrun", "--yes", "--to-yaml", "--yaml")  # of NeMo-Run's command, here used
SHELL = {"docker", "mkdir", "pip", "."}  # nothing of ours to check
BLOCK = re.compile(r"^(?P<mark><!-- (?:not )?run: [^>]*-->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)


def blocks(page):
    return [match.groupdict() for match in BLOCK.finditer(page.read_text())]


def lines(body):
    """Commands, whole where they are continued, without comments or a listing's descriptions."""
    for line in body.replace("\\\n", " ").splitlines():
        line = re.split(r"\s{3,}(?=\w)", line.split(" # ")[0])[0].strip()
        if line:
            yield line


PAIRS = [(page, block) for page in PAGES for block in blocks(page) if block["kind"] != "text"]
IDS = [f"{page.relative_to(ROOT).with_suffix('')}-{number}" for number, (page, _) in enumerate(PAIRS)]


@pytest.mark.parametrize(("page", "block"), PAIRS, ids=IDS)
def test_a_block_is_run_or_says_why_not_and_is_right(page, block, tmp_path):
    if block["kind"] == "python":
        check_python(block["body"], page, tmp_path)
        return
    assert block["kind"] == "", "commands have no language, output is `text`"
    mark = block["mark"] or ""
    assert mark or page.name == "README.md", f"no comment says what runs it:\n{block['body']}"
    for file in re.findall(r"\S+\.py\b", mark):
        assert (ROOT / file).is_file(), file
    assert not mark.startswith("<!-- not run") or len(mark.split()) > 4, "a reason is missing"
    write_recipes(page, tmp_path)
    for line in lines(block["body"]):
        check(line, tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_examples_that_it_reads(name, tmp_path):
    found = [line.strip() for line in (COMMANDS[name].help or "").splitlines() if f"minitron {name}" in line]
    examples = [line.split(" | ")[-1] for line in found if "`" not in line]
    assert examples
    for line in examples:
        check(line, tmp_path)


def check(line, folder):
    words = shlex.split(line)
    if words[0] == "minitron":
        check_minitron(words[1:], folder)
    elif words[:2] == ["nemo", "minitron"]:
        check_nemo(words[2:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target '{words[1]}'"
    elif words[0] in ("torchrun", "python", "pytest"):
        files = [word for word in words[1:] if "/" in word]
        assert files, line
        assert all((ROOT / file).exists() for file in files[: 1 if words[0] != "pytest" else None]), line
    else:
        assert words[0] in SHELL, f"unknown command '{line}'"
        for part in re.findall(r"(?<!\S)minitron (.*)", line.split("docker run")[-1]) if "docker run" in line else []:
            check_minitron(shlex.split(part), folder)


def check_minitron(words, folder):
    """Parses as the command line does, and builds the recipe with its overrides; a listing's brackets are options."""
    words = [word.strip("[]") for word in words if word not in ("...]", "key=value", "[key=value")]
    assert words[0] in COMMANDS, f"minitron has no command '{words[0]}'"
    command = COMMANDS[words[0]]
    given = ["1" if word == "N" else word for word in words[1:]]
    context = command.make_context(words[0], given)
    recipe = context.params.get("recipe")
    if recipe and is_model(recipe):
        assert context.params["data"], "a model needs a text"
    elif recipe and recipe not in ("RECIPE", "runs/NAME/recipe.json"):
        own = [text for text in context.params["overrides"] or [] if not text.startswith("executor.")]
        job = find(str(folder / recipe) if (folder / recipe).is_file() else recipe).override(own)
        offline = job.teacher_config and not job.chain
        if offline and context.params["dry_run"] and not context.params.get("executor"):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
            assert "nothing was loaded or written" in done.output
    if words == ["doctor"]:
        assert "all is well" in CliRunner().invoke(app, words).output


def check_nemo(words):
    tree = ast.parse((ROOT / "nemo_minitron/cli/nemo_run.py").read_text())
    decorated = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assert words[0] in decorated, f"nemo minitron has no command '{words[0]}'"
    options = [word for word in words[1:] if word.startswith("--") and word != "--factory"]
    assert set(options) <= set(NEMO_RUN), options
    settings = [word for word in words[1:] if "=" in word and not word.startswith(("out=", "run."))]
    job = find(words[words.index("--factory") + 1]) if "--factory" in words else None
    assert job is None or job.override(settings)


def write_recipes(page, folder):
    """Python blocks that begin with `# NAME.py` are files of the page's commands."""
    for block in blocks(page):
        if block["kind"] == "python" and (name := re.match(r"# (\w+\.py)\n", block["body"])):
            (folder / name[1]).write_text(block["body"])


# -- Python ----------------------------------------------------------------------------------------------
def check_python(code, page, folder):
    tree = ast.parse(code)
    compile(tree, str(page), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                assert module_file(name.name), name.name
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                assert defines(node.module, name.name), f"{node.module} has no {name.name}"


def module_file(module):
    """Found on disk, not imported: NeMo takes 13 s."""
    for root in (ROOT, LIBRARIES):
        place = root.joinpath(*module.split("."))
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return file
        if place.is_dir():
            return place
    return None


def defines(module, name):
    file = module_file(module)
    if file is None or module_file(f"{module}.{name}"):
        return file is not None
    if file.is_dir():
        return False
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            if "__all__" in found and isinstance(node.value, ast.List):
                found |= {item.value for item in node.value.elts if isinstance(item, ast.Constant)}
    return name in found


# -- words -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            target, _, anchor = link.partition("#")
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), link
            linked = file.read_text() if anchor else ""  # a picture has no text
            heads = [head.lower().replace(" ", "-") for head in re.findall(r"^#+ (.*)$", linked, re.M)]
            assert not anchor or anchor in heads, link
    for name in re.findall(r"`((?:tests|nemo_minitron|benchmarks|recipes|examples|docker)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    pages = [f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")]
    assert [page for page in [*pages, "docker/README.md"] if f"({page})" not in text] == []


def test_the_recipes_table_says_what_the_recipes_are():
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([^|]*->[^|]*) \|", (ROOT / "docs/recipes.md").read_text(), re.M)
    assert sorted(name for name, _ in rows) == sorted(names())
    for name, parameters in rows:
        job = find(name)
        if job.teacher_config and job.keep and not job.chain:
            source = from_hf(job.teacher_config)
            counts = [architecture.parameters() for architecture in (source, student_architecture(source, job.keep))]
            assert parameters == " -> ".join(f"{count / 1e9:.2f}B" for count in counts), name


def test_the_families_table_names_them_all():
    rows = re.findall(r"^\| .* \| `?(\w+)`? \| `(\w+)` \|$", (ROOT / "docs/own-model.md").read_text(), re.M)
    classes = {family.hf_class: family.nemo_model if "nemo" in family.hosts else "none" for family in FAMILIES}
    assert sorted(rows) == sorted((nemo_class, hf_class) for hf_class, nemo_class in classes.items())


def test_the_mutations_named_exist():
    text = (ROOT / "docs/reductions.md").read_text().split("## How it is tested")[1]
    named = set(re.findall(r"`(\w+)`", text))
    tree = ast.parse((ROOT / "tests/importance/mutations.py").read_text())
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    assert named == found


def said():
    """Every text of the package, with a mark for each value that it is filled with."""
    for file in (ROOT / "nemo_minitron").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_the_messages_of_troubleshooting_are_minitrons():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    ours = text.split("## What minitron says")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", ours, re.M)
    assert len(messages) > 25
    whole = "\n".join(said())
    assert [message for message in messages if message not in whole] == []
