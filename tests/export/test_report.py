"""The report of synthetic run folders: what it says, that it stands alone, what it leaves out and refuses."""

import base64
import json
import re

import numpy as np
import pytest
from run_folder import EVIL, SOURCE, page, rows, write

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.errors import InputError
from nemo_minitron.export import write_report


def test_the_report_says_what_came_out(run):
    text = " ".join(" ".join(page(run).words).split())
    for fact in (
        "my run", "hidden size 12 8 −33.3 %", "FFN width 600 400", "layers 4 4", "17.25", "500.50",
        "9.70e7", "estimate 1 min 15 s", "together 1 min 16 s", "torch 2.13.0", "feed", '"ffn": 400',
        "8 samples (4,096 tokens)", "12,800 tokens in all; 100 steps", "keeps 400 of 600 neurons",
        "those left of the line", "The plan keeps every layer",
        "The plan does not cut the number of attention heads",
        "big: 90.8 k → 41.3 k", "of 90.8 k (−54.5 %)", "teacher 17.2; loss +1.372 ± 0.020 nats", "61.2 %",
        "of the likeliest next tokens are the same, ± 0.8 points", "800 ms teacher 1.25 s; prompt of 256 tokens",
        "tokens a second 21.0 teacher 17.0; one sequence, CPU, 2 threads, bf16",
        "1 min 16 s on 6 processes; 12,800 tokens learned", "Cut at random to the same sizes: 9.70e7",
    ):  # fmt: skip
        assert fact in text, fact
    assert text.index("teacher text") < text.index("pruned text")


def test_the_report_opens_without_a_network(run):
    shown = page(run)
    assert shown.tags.count("svg") == 2 * 7  # layers, four widths, distillation, perplexity, each wide and narrow
    assert all(address.startswith(("#", "data:image/")) for address in shown.loads), shown.loads
    files = {base64.b64decode(address.removeprefix("data:text/csv;base64,")) for address in shown.links}
    assert files == {file.read_bytes() for file in (run / "figures").glob("*.csv")}
    assert not set(shown.tags) & {"script", "link", "iframe", "object", "img"}
    text = (run / "report.html").read_text()
    assert not re.search(r"url\((?!#)|@import", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip


def test_text_from_outside_is_text(run):
    shown = page(run)
    assert EVIL in "".join(shown.words)
    for drawing in (run / "figures").glob("*.svg"):
        assert "<script" not in drawing.read_text()


def test_ids_of_the_figures_do_not_clash(run):
    text = write_report(run).read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    used = re.findall(r'(?:url\(|href=")#([^")]+)', text)
    assert len(ids) == len(set(ids)) > 50
    assert len(used) > 20
    assert set(used) <= set(ids)


def test_the_same_run_gives_the_same_bytes(run):
    files = [write_report(run), *sorted((run / "figures").iterdir())]
    before = [file.read_bytes() for file in files]
    write_report(run)
    assert [file.read_bytes() for file in files] == before


def test_figures_stay_small(run):
    write_report(run)
    assert max(file.stat().st_size for file in (run / "figures").glob("*.svg")) < 100_000


def test_benchmarks_stand_side_by_side_with_their_errors(run):
    """As lm-eval names them; what is no metric is left out."""
    measured = {"acc,none": 0.5123, "acc_stderr,none": 0.0049, "acc_norm,none": 0.6, "sample_len": 100}
    rows = {"teacher": {"hellaswag": measured}, "distilled": {"hellaswag": measured | {"acc,none": 0.4}, "mine": {}}}
    write(run, "benchmarks.json", rows)
    text = " ".join(" ".join(page(run).words).split())
    assert "hellaswag acc 0.512 ± 0.005 0.400 ± 0.005 hellaswag acc_norm 0.600 0.600 By lm-eval" in text
    assert "sample_len" not in text
    write(run, "benchmarks.json", {"teacher": {"x": {"acc,none": "high"}}})
    with pytest.raises(InputError, match=r"benchmarks.json' cannot be used: 'teacher\.x\.acc,none' is 'high'"):
        write_report(run)


def test_held_out_losses_are_drawn_beside_the_curve(run):
    (run / "checkpoints/distilled/validation.csv").write_text("step,tokens,loss\n50,6400,3.5\n100,12800,3.25\n")
    write_report(run)
    assert "held-out text" in (run / "figures" / "distillation.svg").read_text()


# -- what is missing -------------------------------------------------------------------------------------
def test_a_plan_that_cuts_depth_only(run):
    write_report(run)
    PrunePlan(SOURCE, SOURCE.replace(num_layers=2), {"layers": [0, 3]}).save(run / "plan.json")
    text = " ".join(page(run).words)
    assert "The plan does not cut the FFN width." in text
    assert "The plan does not cut the hidden size." in text
    assert "The plan cuts layers 1 to 2." in text
    names = {file.name for file in (run / "figures").iterdir()}
    assert "layers.svg" in names
    assert {"ffn.svg", "hidden.svg"} <= names  # drawn, whether it is cut or not
    assert {row["kept"] for row in rows(run, "hidden")} == {"1"}


def test_figures_of_an_earlier_report_are_removed(run, scores):
    write_report(run)
    left = {name: values for name, values in scores.tensors.items() if name != "hidden"}
    Scores(SOURCE, left).save(run / "scores.safetensors")
    assert "The run has no scores for the hidden size." in " ".join(page(run).words)
    assert not list((run / "figures").glob("hidden.*"))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("scores.safetensors", "The run has no scores yet."),
        ("plan.json", "The run has no plan yet."),
        ("numbers.json", "No model of this run was evaluated yet."),
        ("samples.json", "The run has no samples of text."),
        ("checkpoints/distilled/loss.csv", "The run has no distillation curve."),
        ("recipe.json", "The run folder has no recipe.json."),
        ("manifest.json", "No stage is finished yet."),
    ],
)
def test_each_file_may_be_missing(run, file, says):
    (run / file).unlink()
    assert says in " ".join(page(run).words)


def test_a_run_that_has_only_begun(tmp_path):
    write(tmp_path, "recipe.json", {"name": "x"})
    assert page(tmp_path).tags.count("svg") == 0


def test_the_curve_may_lie_in_the_students_folder(run):
    (run / "student").mkdir()
    (run / "checkpoints/distilled/loss.csv").rename(run / "student/loss.csv")
    write_report(run)
    assert len(rows(run, "distillation")) == 100


@pytest.mark.parametrize("content", ["step,tokens,loss,seconds\n", "step,tokens,loss,seconds\n1,128,4.5,1\n"])
def test_a_curve_of_no_or_one_step(run, content):
    (run / "checkpoints/distilled/loss.csv").write_text(content)
    write_report(run)
    assert (run / "figures/distillation.csv").exists() == ("4.5" in content)


def test_scores_of_zero(run):
    tensors = {"ffn": (4, 600), "hidden": (12,), "layers": (4,)}
    Scores(SOURCE, {n: np.zeros(s, np.float32) for n, s in tensors.items()}).save(run / "scores.safetensors")
    assert page(run).tags.count("svg") == 2 * 5


def test_a_step_whose_loss_is_no_number_is_left_out_and_told(run):
    (run / "checkpoints/distilled/loss.csv").write_text("step,tokens,loss\n1,128,4.5\n2,256,4.25\n3,384,nan\n")
    assert "Steps without a finite loss: 1" in "".join(page(run).words)
    assert [row["step"] for row in rows(run, "distillation")] == ["1", "2"]


def test_the_page_may_load_nothing(run):
    """Whatever a name says, the browser is told to fetch nothing."""
    assert "default-src 'none'" in write_report(run).read_text()


# -- refusals --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("numbers.json", '[{"stage": "teacher"}]', "not an object with 'corpus'"),
        ("numbers.json", "{}", "not a list"),
        ("samples.json", '[{"stage": "teacher", "text": "x"}]', "not an object with 'prompt'"),
        ("manifest.json", '{"stages": [{"name": "x"}]}', "'stages.0' is .* not an object with 'seconds'"),
        ("manifest.json", "[]", "not an object"),
        ("recipe.json", "{", "not valid JSON"),
        ("checkpoints/distilled/loss.csv", "step,loss\n1,2\n", "no loss curve"),
        ("checkpoints/distilled/loss.csv", "step,tokens,loss\n1,2,x\n", "no loss curve"),
        ("scores.safetensors", "x", "no file of scores"),
    ],
)
def test_damaged_files_are_refused_by_name(run, file, content, says):
    (run / file).write_text(content)
    with pytest.raises(InputError, match=says) as caught:
        write_report(run)
    assert (run / file).name in str(caught.value)


def test_numbers_that_are_none_are_refused(run):
    numbers = json.loads((run / "numbers.json").read_text())
    write(run, "numbers.json", [numbers[0] | {"perplexity": float("inf")}])
    with pytest.raises(InputError, match=r"'0\.perplexity' is inf, not a finite number"):
        write_report(run)


def test_what_is_no_run_folder_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        write_report(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no run folder"):
        write_report(tmp_path / "empty")
    other = SOURCE.replace(num_layers=5)
    PrunePlan(other, other, {}).save(run / "plan.json")
    with pytest.raises(InputError, match="different models"):
        write_report(run)
