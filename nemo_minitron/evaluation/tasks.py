"""Benchmarks by lm-eval, an optional package: tasks by name, or by the path of a task's YAML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.model import dtype_name
from nemo_minitron.families import from_hf

YAML = (".yaml", ".yml")


def run_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    precision: str = "bf16",
    batch_size: int = 4,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> number, as lm-eval names them; `limit`: documents of each task.

    Raises InputError where lm-eval is not installed, the folder is no model, or a name is unknown.
    """
    from_hf(folder)
    dtype = dtype_name(precision)
    lm_eval, manager, names = _find(tasks)
    import torch

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": dtype, "trust_remote_code": False},
        tasks=names,
        task_manager=manager,
        batch_size=batch_size,
        limit=limit,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return {
        task: {name: value for name, value in row.items() if isinstance(value, (int, float))}
        for task, row in results["results"].items()
    }


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises InputError, before any model is loaded, where lm-eval is missing or does not know a task."""
    if tasks:
        _find(tasks)


def _find(tasks: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """lm-eval, its task manager and the tasks' names."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("tasks need lm-eval; install it with: pip install 'lm_eval[hf]'") from None
    folders = sorted({str(Path(task).parent) for task in tasks if task.endswith(YAML)})
    manager = TaskManager(include_path=folders or None)
    names = [task_name(task) for task in tasks]
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"lm-eval has no task '{name}'; `lm_eval --tasks list` lists them")
    return lm_eval, manager, names


def task_name(task: str) -> str:
    """A name as it is; of a YAML file its `task:` line. Not parsed: such files hold tags of lm-eval's own."""
    if not task.endswith(YAML):
        return task
    if not Path(task).is_file():
        raise InputError(f"the task file '{task}' does not exist")
    found = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", Path(task).read_text(), re.MULTILINE)
    if not found:
        raise InputError(f"the task file '{task}' has no line 'task: NAME'")
    return found[1]
