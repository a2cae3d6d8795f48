"""`minitron compress` with `evaluation.every`: the training in parts is the training in one, measured on the way."""

import json
import shutil

import pytest
from command_line import losses, minitron
from pico import raw_tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def along(world):
    """The finished job once more, from its training on, in three parts of two steps; what it said."""
    shutil.copytree(world / "run", world / "along")
    shutil.rmtree(world / "along" / "checkpoints" / "distilled")
    (world / "other.txt").write_text("\n\n".join(f"another text, of {i} and {i * i} lines" for i in range(200)))
    settings = ["evaluation.every=144", "evaluation.texts=other.txt"]
    return minitron(world, "compress", "recipe.py", "--out", "along", "--overwrite", *settings)


def test_the_training_has_the_bits_of_one_without_stops(world, along):
    one, parts = (world / run / "checkpoints" / "distilled" / "loss.csv" for run in ("run", "along"))
    assert losses(parts) == losses(one)
    one, parts = (raw_tensors(world / run / "student") for run in ("run", "along"))
    assert [name for name in one if one[name].tobytes() != parts[name].tobytes()] == []


def test_the_student_is_measured_on_the_way(world, along):
    found = json.loads((world / "along" / "trajectory.json").read_text())
    places = [(row["step"], row["tokens"], row["text"]) for row in found["rows"]]
    assert places == [(step, 72 * step, text) for step in (0, 2, 4, 6) for text in ("corpus", "other.txt")]
    numbers = {row["stage"]: row for row in json.loads((world / "along" / "numbers.json").read_text())}
    of_text = {row["step"]: row["loss"] for row in found["rows"] if row["text"] == "corpus"}
    assert (of_text[0], of_text[6]) == (numbers["pruned"]["loss"], numbers["distilled"]["loss"])
    assert len(set(of_text.values())) == 4
    assert {row["text"]: row["loss"] for row in found["teacher"]}["corpus"] == numbers["teacher"]["loss"]
    assert "after 288 tokens: held-out loss" in along
    assert not (world / "along" / "checkpoints" / "along").exists()
    assert "Held-out loss along the distillation" in (world / "along" / "report.html").read_text()


def test_nothing_else_is_done_again(world, along):
    assert "evaluate: done before, skipped" in along
    again = minitron(
        world, "compress", "recipe.py", "--out", "along", "evaluation.every=144", "evaluation.texts=other.txt"
    )
    assert again.count("done before, skipped") == 11
