"""The benchmarks of the papers by name, each with lm-eval's task or, if it has none, the tool that runs it; and
lm-eval's own tasks, by name or in a file.

For base models the shots are those of 2407.14679 and 2408.11796; for instruct models they are lm-eval's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from nemo_minitron.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """`task`: lm-eval's name, empty if it has none; `shots`: examples before the question, None for the task's own
    number.

    `note`: the tool that runs it instead, or what the task needs.
    """

    name: str
    task: str = ""
    shots: int | None = None
    note: str = ""


CODE = "runs the model's programs: HF_ALLOW_CODE_EVAL=1, in a sandbox"
BASE = (
    Benchmark("MMLU", "mmlu", 5),
    Benchmark("ARC-Challenge", "arc_challenge", 25),
    Benchmark("HellaSwag", "hellaswag", 10),
    Benchmark("Winogrande", "winogrande", 5),
    Benchmark("GSM8K", "gsm8k", 5),
    Benchmark("TruthfulQA", "truthfulqa_mc2", 0),
    Benchmark("XL-Sum", note="lm-eval has it in Spanish (xlsum_es), not in English: a task file of your own, 3 shots"),
    Benchmark("MBPP", "mbpp", 0, CODE),
    Benchmark("HumanEval", "humaneval", 0, CODE),
)
INSTRUCT = (
    Benchmark("IFEval", "ifeval"),
    Benchmark("MT-Bench", note="lm-eval has none: FastChat's llm_judge, with a judge model"),
    Benchmark("ChatRAG-Bench", note="lm-eval has none: the scripts beside nvidia/ChatRAG-Bench on the hub"),
    Benchmark("BFCL", note="lm-eval has none: bfcl-eval, of the Berkeley Function Calling Leaderboard"),
)
SETS = {"base": BASE, "instruct": INSTRUCT}
BENCHMARKS = {benchmark.name: benchmark for benchmark in (*BASE, *INSTRUCT)}
YAML = (".yaml", ".yml")
TYPO = 0.7  # names that are so alike differ by a slip of the hand


def benchmarks(names: Iterable[str]) -> list[Benchmark]:
    """The benchmarks of sets (base, instruct), of single names, and of lm-eval's own tasks by name or FILE.yaml, each
    once. Only lm-eval knows its own names (`tasks.check_tasks`). Raises InputError for a slip in a name of the papers,
    and for a file that is missing or names no task."""
    chosen: list[Benchmark] = []
    for name in names:
        chosen += SETS[name] if name in SETS else [BENCHMARKS.get(name) or _own_task(name)]
    return list(dict.fromkeys(chosen))


def _own_task(name: str) -> Benchmark:
    """A task of lm-eval with its own number of shots. `hellaswag` is one; `HelaSwag` is a slip."""
    known = [*SETS, *BENCHMARKS]
    if name.lower() not in map(str.lower, known) and difflib.get_close_matches(name, known, n=1, cutoff=TYPO):
        raise InputError(f"benchmark '{name}' is unknown; {nearest(name, known)}")
    return Benchmark(name, task_name(name))


def task_name(task: str) -> str:
    """The name of a task, for a YAML file from its `task:` line. The file is not parsed, since it may hold lm-eval's
    own tags."""
    if not task.endswith(YAML):
        return task
    if not Path(task).is_file():
        raise InputError(f"the task file '{task}' does not exist")
    match = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", Path(task).read_text(), re.MULTILINE)
    if not match:
        raise InputError(f"the task file '{task}' has no line 'task: NAME'")
    return match[1]


def describe_benchmarks(chosen: Iterable[Benchmark]) -> list[str]:
    """One line for each benchmark: how lm-eval runs it, or what runs it instead."""
    lines = []
    for benchmark in chosen:
        shots = "" if benchmark.shots is None else f", {benchmark.shots} shots"
        how = f"lm-eval's {benchmark.task}{shots}" if benchmark.task else ""
        lines.append(f"{benchmark.name}: " + "; ".join(part for part in (how, benchmark.note) if part))
    return lines
