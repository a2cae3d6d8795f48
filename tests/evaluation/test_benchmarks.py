"""The papers' benchmarks by name: their tasks and shots in lm-eval, and what is said of those that it lacks."""

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import BASE, INSTRUCT, benchmarks, describe_benchmarks
from nemo_minitron.evaluation.tasks import with_shots


@pytest.fixture(autouse=True)
def no_leave(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)


def test_sets_and_names_each_once():
    names = [benchmark.name for benchmark in benchmarks(["MMLU", "base", "BFCL", "instruct"])]
    assert names == [
        "MMLU", "ARC-Challenge", "HellaSwag", "Winogrande", "GSM8K", "TruthfulQA", "XL-Sum", "MBPP", "HumanEval",
        "BFCL", "IFEval", "MT-Bench", "ChatRAG-Bench",
    ]  # fmt: skip
    with pytest.raises(InputError, match="benchmark 'MMUL' is unknown; did you mean 'MMLU'"):
        benchmarks(["MMUL"])


def test_each_is_run_or_said_where():
    for benchmark in (*BASE, *INSTRUCT):
        assert benchmark.task or benchmark.note
    lines = describe_benchmarks(benchmarks(["MMLU", "MT-Bench", "HumanEval", "IFEval"]))
    assert lines == [
        "MMLU: lm-eval's mmlu, 5 shots",
        "MT-Bench: lm-eval has none: FastChat's llm_judge, with a judge model",
        "HumanEval: lm-eval's humaneval, 0 shots; runs the model's programs: HF_ALLOW_CODE_EVAL=1, in a sandbox",
        "IFEval: lm-eval's ifeval",
    ]


def test_tasks_go_to_lm_eval_with_their_shots(monkeypatch):
    assert with_shots(["MMLU", "GSM8K", "ARC-Challenge", "piqa", "instruct"]) == {
        5: ["mmlu", "gsm8k"], 25: ["arc_challenge"], None: ["piqa", "ifeval"],
    }  # fmt: skip
    with pytest.raises(InputError, match=r"BFCL is not run by lm-eval; .*bfcl-eval"):
        with_shots(["BFCL"])
    with pytest.raises(InputError, match="MBPP runs the model's programs: HF_ALLOW_CODE_EVAL=1"):
        with_shots(["base"])
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert sum(map(len, with_shots(["base"]).values())) == 8  # all but XL-Sum
