"""Runs benchmarks with lm-eval, an optional package: tasks by name, by the path of their YAML file, or the papers'
sets."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.evaluation.benchmarks import CODE, SETS, YAML, benchmarks
from nemo_minitron.evaluation.model import load
from nemo_minitron.families import from_hf
from nemo_minitron.families.tokenizer import largest_id, open_tokenizer

if TYPE_CHECKING:
    from types import ModuleType

    from lm_eval.tasks import TaskManager as LmEvalTasks
    from transformers import PreTrainedTokenizerBase


def run_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    precision: str = "bf16",
    batch_size: int = 4,
    limit: int | None = None,
) -> dict[str, JsonObject]:
    """Task -> metric -> number, as lm-eval names them; `limit`: documents of each task.

    `tasks` may also be `base`, `instruct` or a benchmark's name (`evaluation.benchmarks`), with its shots; benchmarks
    of a set that lm-eval lacks are left out. Raises InputError if lm-eval is not installed, the folder is no model, a
    name is unknown, or programs that the model writes would run without permission.
    """
    from_hf(folder)
    lm_eval, manager, by_shots = _find(tasks)
    from lm_eval.models.huggingface import HFLM

    metrics: dict[str, JsonObject] = {}
    with _ids_within(folder) as tokenizer:
        # not given by its path: lm-eval would read the folder's config as transformers alone does
        model = HFLM(pretrained=load(folder, precision), tokenizer=tokenizer, batch_size=batch_size)
        for shots, names in by_shots.items():
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=names,
                num_fewshot=shots,
                task_manager=manager,
                limit=limit,
                **({"confirm_run_unsafe_code": True} if _may_run_programs() else {}),
            )["results"]
            for task, row in results.items():
                metrics[task] = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    return metrics


@contextlib.contextmanager
def _ids_within(folder: str | Path) -> Iterator[PreTrainedTokenizerBase]:
    """Yields the tokenizer. If the block fails and the tokenizer has tokens that the model has no row for, the error
    says so: lm-eval does not check them."""
    tokenizer, rows = open_tokenizer(folder), from_hf(folder).vocab_size
    try:
        yield tokenizer
    except (IndexError, RuntimeError) as error:
        largest = largest_id(tokenizer)
        if largest < rows:
            raise
        raise InputError(
            f"the model '{folder}' failed on lm-eval's texts ({first_line(error)}): its tokenizer has tokens up to "
            f"{largest}, but the model has rows for 0 to {rows - 1}; resize its embedding, or mend the tokenizer"
        ) from error


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises InputError, before any model is loaded, if lm-eval is missing or does not know a task."""
    if tasks:
        _find(tasks)


def _find(tasks: Sequence[str]) -> tuple[ModuleType, LmEvalTasks, dict[int | None, list[str]]]:
    """lm-eval, its task manager, and shots -> names of tasks (None: each task's own shots)."""
    by_shots = with_shots(tasks)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError(
            "tasks need lm-eval; install it with: pip install 'lm_eval[hf]', or in a clone: pip install '.[eval]'"
        ) from None
    manager = _manager(TaskManager, tuple(sorted({str(Path(task).parent) for task in tasks if task.endswith(YAML)})))
    for name in (name for names in by_shots.values() for name in names):
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "`lm_eval --tasks list` lists them"
            raise InputError(f"lm-eval has no task '{name}'; {hint}")
    return lm_eval, manager, by_shots


@functools.cache
def _manager(kind: type[LmEvalTasks], folders: tuple[str, ...]) -> LmEvalTasks:
    """lm-eval's tasks and those of the folders. It reads thousands of files, so a process makes it once."""
    return kind(include_path=list(folders) or None)


def with_shots(tasks: Sequence[str]) -> dict[int | None, list[str]]:
    """Shots -> lm-eval's names. Raises InputError for a benchmark that lm-eval lacks, or that needs permission."""
    by_shots: dict[int | None, list[str]] = {}
    for task in tasks:
        for benchmark in benchmarks([task]):
            if not benchmark.task and task not in SETS:
                raise InputError(f"{task} is not run by lm-eval; {benchmark.note}")
            if benchmark.note == CODE and not _may_run_programs():
                raise InputError(f"{benchmark.name} {CODE}; or name the other benchmarks one by one")
            by_shots.setdefault(benchmark.shots, []).extend([benchmark.task] * bool(benchmark.task))
    return {shots: names for shots, names in by_shots.items() if names}


def _may_run_programs() -> bool:
    return os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
