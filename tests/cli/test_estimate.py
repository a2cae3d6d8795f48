"""`minitron estimate` on a pico model: killed and resumed, in another layout, merged, with criteria of depth."""

import json
import os
import signal
import time

import numpy as np
import pytest
from command_line import minitron, start
from pico import pico_llama
from tolerances import DEPTH_ERROR_FP32, DEPTH_LOSS_FP32, SCORES_FP32
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.blocks import NOTHING, size_of
from nemo_minitron.commands.corpus import tokenise
from nemo_minitron.export import write_report
from nemo_minitron.families import from_hf
from nemo_minitron.job import Calibration, Data, Job
from nemo_minitron.job.run import execute, open_run
from nemo_minitron.job.stages.compress import stages
from nemo_minitron.pruning import HFSource
from nemo_minitron.search.depth import layers_to_drop
from nemo_minitron.sources.tensors import source_digest

TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(900)]
ROWS = 121  # odd: two data-parallel ranks fill up the last batch
ROWS_OPTIONS = ["--samples", ROWS, "--sequence-length", 36, "--criterion", "l2,mean", "--criterion", "var,mean"]
DEPTH_OPTIONS = ["--depth", "loss,perplexity,accuracy,removal", "--depth-sizes", "1,2", "--depth-samples", 3]
COMMAND = ["estimate", "teacher", "--data", "corpus.jsonl", *ROWS_OPTIONS, "--save-every", 4, *DEPTH_OPTIONS]
COMMAND += ["--items", "items.jsonl", "--remove", 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    pico_llama(folder / "teacher")
    save_tokenizer(folder / "teacher", TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    items = [
        {"context": f"the model number {i}", "choices": [" reads", " ends.", " word"], "answer": i % 3}
        for i in range(8)
    ]
    (folder / "items.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """Scores of a run that nothing interrupted, and what it printed."""
    output = minitron(folder, *COMMAND, "--out", "whole.safetensors")
    return Scores.load(folder / "whole.safetensors"), output


@pytest.mark.slow
def test_all_of_one_command(folder, whole):
    scores, output = whole
    assert (scores.samples, scores.tokens) == (ROWS, ROWS * 36)
    assert scores.criteria == ["l2,mean", "var,mean"]
    assert scores.model_digest == source_digest(HFSource(folder / "teacher"))
    tokens = tokenise(str(folder / "corpus.jsonl"), folder / "teacher", folder / "again" / "rows", 509)
    assert scores.data_digest == tokens.corpus.content
    assert not (folder / ".whole.safetensors.work").exists()
    assert "next: minitron plan whole.safetensors --params 0.7x" in output
    assert list(scores.depth) == ["loss", "perplexity", "accuracy", "removal"]
    assert {size_of(block) for block in scores.depth["accuracy"]} == {0, 1, 2}
    assert len(scores.depth["removal"]) == 2
    for block, loss in scores.depth["loss"].items():
        assert scores.depth["perplexity"][block] == pytest.approx(np.exp(loss))
    assert scores.notes["accuracy"]["items"] == 8
    assert from_hf(scores.notes["config"]) == scores.architecture
    assert scores.notes["split_half"].keys() == {"ffn", "heads", "query_groups", "hidden", "layers"}
    for remark in scores.notes["remarks"]:
        assert remark in output
    assert "the least missed among blocks of 2" in output


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_bits(folder, whole):
    """SIGKILL to all of it after the first save. With `windowed(0, ...)` in place of `windowed(done, ...)`, so that
    the second run sees the first rows twice, or with `previous=None`, the states differ."""
    process = start(folder, *COMMAND, "--out", "killed.safetensors")
    statistics = folder / ".killed.safetensors.work" / "statistics.safetensors"
    deadline = time.monotonic() + 300
    while not statistics.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = Scores.load(statistics).samples
    assert 0 < done < ROWS
    assert not (folder / "killed.safetensors").exists()
    output = minitron(folder, *COMMAND, "--out", "killed.safetensors")
    assert f"{done} of {ROWS} rows were done before" in output
    straight, resumed = whole[0], Scores.load(folder / "killed.safetensors")
    assert (resumed.samples, resumed.tokens, resumed.notes) == (straight.samples, straight.tokens, straight.notes)
    assert resumed.states.keys() == straight.states.keys()
    assert [name for name in straight.states if not np.array_equal(straight.states[name], resumed.states[name])] == []
    assert resumed.depth == straight.depth
    assert resumed.digest == straight.digest
    assert not statistics.parent.exists()


@pytest.mark.slow
@pytest.mark.long
def test_four_ranks_share_an_odd_number_of_rows(folder, whole):
    """Two of data, two of a pipeline with virtual stages: three rows of the last batch do not count. The states show
    whose rows each chunk saw: with NeMo's data step watched on the first chunk alone their halves are wrong."""
    minitron(folder, *COMMAND, "--out", "four.safetensors", "--dp", 2, "--pp", 2, "--vp", 3)
    one, four = whole[0], Scores.load(folder / "four.safetensors")
    assert (four.samples, four.tokens, four.layout["dp"]) == (ROWS, ROWS * 36, 2)
    for mine, theirs in ((one.tensors, four.tensors), (one.states, four.states)):
        for name, expected in mine.items():
            largest = np.abs(expected).max(axis=-1, keepdims=True)
            assert (np.abs(theirs[name] - expected) <= SCORES_FP32 * largest).all(), name
    for name, tolerance in {"loss": DEPTH_LOSS_FP32, "removal": DEPTH_ERROR_FP32}.items():
        assert list(four.depth[name]) == list(one.depth[name])
        np.testing.assert_allclose(list(four.depth[name].values()), list(one.depth[name].values()), rtol=tolerance)
    assert four.depth["accuracy"] == one.depth["accuracy"]


@pytest.fixture(scope="module")
def run(folder):
    """The first stages of a job that drops two layers by loss; its calibration has another seed."""
    calibration = Calibration(
        samples=ROWS, sequence_length=36, criterion="l2,mean;var,mean", depth_samples=3, batch_size=4, seed=5
    )
    job = Job(
        name="pico", teacher=str(folder / "teacher"), data=Data(*[str(folder / "corpus.jsonl")] * 2),
        keep={"layers": 4, "ffn": 64}, calibration=calibration, depth="loss",
    )  # fmt: skip
    run = open_run(job, folder / "run")
    execute(run, stages(job)[:3])
    return run


@pytest.mark.slow
def test_a_recipe_drops_layers_by_loss_and_the_report_draws_it(run):
    scores, plan = Scores.load(run.path("scores.safetensors")), PrunePlan.load(run.path("plan.json"))
    assert {size_of(block) for block in scores.depth["loss"]} == {0, 1, 2}  # 2: what the plan takes
    gone = layers_to_drop(scores, 2, "loss")
    assert plan.keep["layers"] == [layer for layer in range(6) if layer not in gone]
    assert plan.notes["depth"] == "loss"
    assert "without layers" in run.path("log.txt").read_text()
    report = write_report(run.folder.path).read_text()
    assert "Dropped layers" in report
    rows = run.path("figures", "depth.csv").read_text().splitlines()
    assert len(rows) == 1 + len(scores.depth["loss"])
    assert f"loss,0,-1,0,{scores.depth['loss'][NOTHING]}"[:20] in "\n".join(rows)


@pytest.mark.slow
def test_two_runs_merge_into_one(folder, whole, run):
    """Nothing is left to gather of the first run, so no process starts."""
    options = ["--merge", run.path("scores.safetensors"), "--overwrite"]
    output = minitron(folder, *COMMAND, "--out", "whole.safetensors", *options)
    made, other = Scores.load(folder / "whole.safetensors"), Scores.load(run.path("scores.safetensors"))
    whole[0].save(folder / "whole.safetensors")
    assert "  > " not in output
    assert made.samples == 2 * ROWS
    squares = [scores.states["ffn/l2,mean/sum_of_squares"].sum(1) for scores in (whole[0], other)]
    expected = np.sqrt(squares[0] + squares[1])
    np.testing.assert_allclose(made["ffn"], expected, rtol=1e-6)  # fp32 in the file
    assert [run["seed"] for run in made.notes["runs"]] == [5, 1234]
    assert "the same text with other seeds" in output
    assert made.depth == whole[0].depth
    with pytest.raises(AssertionError, match="have seen the same rows: the same text with seed 1234"):
        minitron(folder, *COMMAND, "--out", "twice.safetensors", "--merge", "whole.safetensors")


@pytest.mark.slow
def test_taylor_in_parts_and_rows_that_a_batch_cannot_hold(folder):
    options = ["--samples", 5, "--batch-size", 2, "--save-every", 2, "--method", "taylor", "--sequence-length", 36]
    minitron(folder, "estimate", "teacher", "--data", "corpus.jsonl", *options, "--out", "taylor.safetensors")
    scores = Scores.load(folder / "taylor.safetensors")
    assert (scores.method, scores.samples, scores.tokens) == ("taylor", 5, 5 * 36)
    assert (scores["ffn"] > 0).all()
    assert scores.model_digest == source_digest(HFSource(folder / "teacher"))


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_scores_that_need_no_run(folder, method):
    out = folder / f"{method}.safetensors"
    output = minitron(folder, "estimate", "teacher", "--data", "corpus.jsonl", "--method", method, "--out", out)
    scores = Scores.load(out)
    assert "  > " not in output
    assert (scores.method, scores["ffn"].shape, scores["hidden"].shape) == (method, (6, 96), (48,))
    assert scores.model_digest == source_digest(HFSource(folder / "teacher"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tp", 2], "3 query groups and an ffn of 96; the nearest legal tp is 1"),
        (["--cp", 2, "--sequence-length", 30], "do not divide by 2*cp=4; the nearest legal length is 32"),
        (["--axes", "heads,fnn"], "the model has no scores of 'fnn'; did you mean 'ffn'"),
        (["--axes", "experts"], "the model has no scores of 'experts'; legal are: ffn, "),
        (["--ep", 2], "ep=2 needs a mixture of experts; the nearest legal ep is 1"),
        (["--depth-sizes", "1,6"], "depth_sizes 6 is not legal in a model of 6 layers; legal are 1 to 5"),
        (["--depth-sizes", "a"], "'a' in --depth-sizes is no size"),
        (["--method", "taylor", "--pp", 2, "--vp", 3], "not vp=3; the nearest legal vp is 1"),
        (["--criterion", "l2,men"], "aggregation 'men' in criterion 'l2,men' is unknown; did you mean 'mean'"),
    ],
)
def test_refused_before_anything_is_read(folder, options, words):
    before = sorted(folder.iterdir())
    process = start(folder, *COMMAND, *options, "--out", "refused.safetensors")
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 2, output
    assert output.count("\n") == 1, output
    assert words in output
    assert sorted(folder.iterdir()) == before
