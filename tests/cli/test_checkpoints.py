"""NeMo checkpoints at the command line: cut into one of the same kind, measured, and as the main job's teacher."""

import json
import sys

import forked
import numpy as np
import pytest
from command_line import RECIPE, minitron
from pico import raw_tensors

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.pruning.convert import convert
from nemo_minitron.search import random_plan

pytestmark = pytest.mark.slow
KEEP = {"ffn": 48, "hidden": 40, "layers": 4, "heads": 3}


@pytest.fixture(scope="module")
def checkpoint(world):
    """The distilled student of the main job: as NeMo's trainer saved it, its optimizer beside the weights."""
    training = world / "run" / "checkpoints" / "distilled"
    return training / json.loads((training / "last.json").read_text())["checkpoint"]


@pytest.fixture(scope="module")
def student(world, checkpoint):
    """(plan, the checkpoint cut as it says)."""
    plan = random_plan(from_hf(world / "run" / "student"), keep=KEEP)
    plan.save(world / "plan.json")
    minitron(world, "prune", checkpoint, "plan.json", "nemo-student")
    return plan, world / "nemo-student"


def same(folder, other):
    ours, theirs = raw_tensors(folder), raw_tensors(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not np.array_equal(ours[name], theirs[name])]


def test_a_converted_checkpoint_is_the_folder_that_was_exported(world, checkpoint):
    assert same(convert(checkpoint, world / "converted"), world / "run" / "student") == []


EXPORT = """
import sys
from pathlib import Path
def main():
    import nemo_minitron.backend as backend
    backend.setup()
    from nemo.collections import llm
    llm.export_ckpt(Path(sys.argv[1]), "hf", output_path=Path(sys.argv[2]))
if __name__ == "__main__":
    main()
"""


def test_the_student_is_nemos_and_has_the_cuts_bits(world, student):
    """NeMo's own loader and exporter read the resized context; without the sizes in io.json it builds the
    teacher's model and the export fails on the first shape."""
    plan, folder = student
    prune(world / "run" / "student", plan, world / "cut", overwrite=True)
    (world / "export.py").write_text(EXPORT)
    command = [sys.executable, "export.py", str(folder), "exported-student"]
    done = forked.run(command, cwd=world)
    assert done.returncode == 0, done.stderr[-4000:]
    assert same(world / "exported-student", world / "cut") == []
    assert "nemo_minitron" not in (folder / "context" / "io.json").read_text()
    assert PrunePlan.load(folder / "minitron_plan.json") == plan


def numbers(world, model, *options):
    settings = ["--data", "corpus.jsonl", "--tokens", 256, "--sequence-length", 32, "--precision", "fp32", "--json"]
    return json.loads(minitron(world, "evaluate", model, *settings, *options).splitlines()[-1])


def test_a_checkpoint_is_measured_as_its_folder_is(world, checkpoint):
    ours, folders = numbers(world, checkpoint), numbers(world, "run/student")
    for values in (ours, folders):
        values.pop("seconds")
    assert ours == folders


def test_the_main_job_takes_a_checkpoint_and_indexed_files(world, checkpoint):
    """Its teacher becomes a folder once; the corpus is the other run's `.bin/.idx`, opened where it lies."""
    recipe = RECIPE.replace('teacher="teacher"', f"teacher={str(checkpoint)!r}").replace(
        "corpus.jsonl", "run/data/train"
    )
    recipe = recipe.replace('{"ffn": 66, "layers": 5}', '{"ffn": 48}')
    (world / "from_nemo.py").write_text(recipe)
    output = minitron(world, "compress", "from_nemo.py", "--out", "from-nemo")
    assert "[1/12] convert" in output
    rows = {row["stage"]: row for row in json.loads((world / "from-nemo" / "numbers.json").read_text())}
    teacher, before = rows["teacher"], json.loads((world / "run" / "numbers.json").read_text())[-1]
    assert teacher["loss"] == before["loss"]  # the same model on the same tokens
    assert teacher["bits_per_byte"] == before["bits_per_byte"]
    assert not list((world / "from-nemo" / "data").glob("*.bin"))
    assert from_hf(world / "from-nemo" / "student").ffn_hidden_size == 48
    again = minitron(world, "compress", "from_nemo.py", "--out", "from-nemo")
    assert again.count("done before, skipped") == 12
