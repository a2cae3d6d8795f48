"""The notebook of the demo, run by Jupyter's own client on a pico model, whose job is done already."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "demo.ipynb"

pytestmark = [pytest.mark.slow, pytest.mark.long]
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed here (pip install '.[test]')")


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    """The notebook with its outputs. Its first cell of code, the settings, names the pico job instead of the demo."""
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook") / "here"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("distilled", "nemo-*", "site"))
    shutil.copytree(world / "run" / "checkpoints" / "distilled", folder / "run" / "checkpoints" / "distilled")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    names = [line.split(" = ")[0] for line in settings.source.splitlines()]
    values = {"RECIPE": "recipe.py", "RUN": "run", "OTHER": "ffn=80"}
    assert names == list(values)
    settings.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs(notebook, kind):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in cells for output in cell.outputs]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


def test_every_figure_stands_in_it(ran):
    figures = outputs(ran, "image/svg+xml")
    assert len(figures) == 4
    assert all(figure.lstrip().startswith("<svg") for figure in figures)


def test_its_commands_ran_and_its_numbers_are_the_runs(ran):
    text = "".join(o.text for cell in ran.cells if cell.cell_type == "code" for o in cell.outputs if "text" in o)
    assert "nothing was loaded or written" in text
    assert "done before, skipped" in text
    assert "perplexity" in "".join(output.text for output in ran.cells[-2].outputs)  # of the other cut
    words = "\n".join(outputs(ran, "text/markdown"))
    assert all(f"| {stage} |" in words for stage in ("teacher", "sliced", "pruned", "distilled"))
    assert "**distilled**: the model" in words
