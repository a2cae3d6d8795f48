"""Real tasks of lm-eval from local files: `evaluate --tasks` on the demo's model, and a recipe's benchmarks."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from command_line import minitron

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow
DEMO = Path(__file__).parents[2] / "demo" / "smollm2-135m-instruct"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
FACTS = (  # (question, right, wrong)
    ("The capital of France is", " Paris", " Berlin"),
    ("The opposite of hot is", " cold", " seven"),
    ("Two and two make", " four", " green"),
    ("The sun rises in the", " east", " bottle"),
    ("Ice is frozen", " water", " music"),
    ("A week has seven", " days", " shoes"),
    ("Cats and dogs are", " animals", " numbers"),
    ("We see with our", " eyes", " knees"),
)


@pytest.fixture
def task(tmp_path):
    """A task file `choice.yaml`; the right answer is the first choice of the even rows."""
    rows = [
        {"question": question, "choices": [right, wrong][:: 1 - 2 * (i % 2)], "answer": i % 2}
        for i, (question, right, wrong) in enumerate(FACTS)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "choice.yaml").write_text(TASK.format(name="choice", rows=tmp_path / "rows.jsonl"))
    return tmp_path / "choice.yaml"


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo's model is not here: make venv")
def test_evaluate_runs_a_task_on_the_demos_model(task):
    """Answers that any model of English knows; the margin is lm-eval's own."""
    output = minitron(task.parent, "evaluate", DEMO, "--tasks", task, "--precision", "fp32", "--json")
    row = json.loads(output.splitlines()[-1])["tasks"]["choice"]
    assert row["acc,none"] == 1.0
    assert row["acc_stderr,none"] == 0.0


def test_a_limit_is_the_number_of_documents(world, task):
    """The pico teacher guesses, so that the margin tells three documents from eight."""
    output = minitron(world, "evaluate", "teacher", "--tasks", task, "--precision", "fp32", "--limit", 3)
    p, error = (float(re.search(rf"choice +{name},none +(\S+)\n", output)[1]) for name in ("acc", "acc_stderr"))
    assert 0 < p < 1
    assert error == pytest.approx(math.sqrt(p * (1 - p) / 2), rel=1e-5)


def test_a_recipe_measures_teacher_and_student_side_by_side(world, task):
    """The finished run, with a benchmark: only that stage and the report run. The report shows both, with errors."""
    shutil.copytree(world / "run", world / "measured")
    recipe = ("compress", world / "recipe.py", f'evaluation.benchmarks=["{task}"]', "--out", "measured")
    output = minitron(world, *recipe, "--overwrite")
    assert "distill: done before, skipped" in output
    found = json.loads((world / "measured" / "benchmarks.json").read_text())
    assert found.keys() == {"teacher", "distilled"}
    shown = []
    for row in (found[name]["choice"] for name in ("teacher", "distilled")):
        p, count = row["acc,none"], len(FACTS)
        assert p * count == pytest.approx(round(p * count))
        assert row["acc_stderr,none"] == pytest.approx(math.sqrt(p * (1 - p) / (count - 1)))
        shown.append(f"± {row['acc_stderr,none']:.3f}")
    report = (world / "measured" / "report.html").read_text()
    assert all(text in report for text in ("choice", *shown))
    assert "benchmarks: done before, skipped" in minitron(world, *recipe)
    task.write_text(task.read_text().replace("acc_norm", "acc_norm  # another file"))
    again = minitron(world, *recipe, "--overwrite")
    assert "benchmarks: done before, skipped" not in again
    assert "export: done before, skipped" in again
