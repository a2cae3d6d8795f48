"""Tasks of lm-eval, by name and from a file."""

import json
import sys
import types

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation import run_tasks
from nemo_minitron.evaluation.benchmarks import task_name


def test_tasks_without_lm_eval_say_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="pip install"):
        run_tasks(folder, ["hellaswag"])


TASK = """
task: pico_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_a_local_task_is_scored_by_lm_eval_itself(folder, tmp_path):
    """Each choice is one token: the right answer is the likelier of two, reckoned here from the logits."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    pytest.importorskip("lm_eval")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder, eos_token="w3").save_pretrained(tmp_path / "model")  # lm-eval wants an EOS
    rows = [{"context": f"w{i} w{i + 1}", "choices": ["w7", "w9"], "answer": i % 2} for i in range(1, 13)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "choice.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    right = 0
    for i, row in enumerate(rows, 1):
        logits = model(torch.tensor([[i + 1, i + 2]])).logits[0, -1]  # w0 is token 1
        right += int(logits[8] < logits[10]) == row["answer"]
    results = run_tasks(tmp_path / "model", [str(tmp_path / "choice.yaml")], precision="fp32")
    assert results["pico_choice"]["acc,none"] == pytest.approx(right / len(rows))


def test_tasks_are_handed_to_lm_eval_by_name(folder, monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("tag: x\ntask: 'my_task'  # a comment\nprocess: !function a.b\n")
    called = {}

    class TaskManager:
        def __init__(self, include_path):
            self.all_tasks = ["hellaswag", "my_task"] if include_path == [str(tmp_path)] else ["hellaswag"]

    def simple_evaluate(**given):
        called.update(given)
        return {"results": {"my_task": {"acc,none": 0.5}}}

    package = types.ModuleType("lm_eval")
    package.simple_evaluate = simple_evaluate
    package.tasks = types.ModuleType("lm_eval.tasks")
    package.tasks.TaskManager = TaskManager
    package.models = types.ModuleType("lm_eval.models.huggingface")
    package.models.HFLM = types.SimpleNamespace  # what it is given, by name
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", package.tasks)
    monkeypatch.setitem(sys.modules, "lm_eval.models", package.models)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", package.models)
    results = run_tasks(folder, ["hellaswag", str(tmp_path / "mine.yaml")], limit=3, precision="fp32")
    assert results == {"my_task": {"acc,none": 0.5}}
    assert called["tasks"] == ["hellaswag", "my_task"]
    assert (called["limit"], str(called["model"].pretrained.dtype)) == (3, "torch.float32")
    assert called["num_fewshot"] is None
    run_tasks(folder, ["HellaSwag"])
    assert (called["tasks"], called["num_fewshot"]) == (["hellaswag"], 10)
    with pytest.raises(InputError, match="no task 'hellaswig'; did you mean 'hellaswag'"):
        run_tasks(folder, ["hellaswig"])
    with pytest.raises(InputError, match="bf16"):
        run_tasks(folder, ["hellaswag"], precision="bf17")
    with pytest.raises(InputError, match="does not exist"):
        task_name(str(tmp_path / "other.yaml"))
