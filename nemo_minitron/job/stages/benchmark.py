"""The stage that measures teacher and student on benchmarks, if the recipe names some."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.files import file_digest, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.evaluation.benchmarks import YAML
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.teacher import teacher_folder


def measure(run: Run) -> None:
    """Writes model (teacher, distilled) -> task -> metric -> number, and prints them."""
    from nemo_minitron.evaluation import run_tasks

    settings = run.job.evaluation
    options: JsonObject = {"precision": settings.precision, "batch_size": settings.batch_size}
    models = {"teacher": teacher_folder(run), "distilled": run.folder.student}
    results = {name: run_tasks(folder, settings.benchmarks, **options) for name, folder in models.items()}
    write_json(run.folder.benchmarks, results)
    for task, row in results["distilled"].items():
        for metric, value in row.items():
            run.say(f"    {task:24} {metric:24} {results['teacher'].get(task, {}).get(metric, '')!s:>8} {value:>8}")


def _inputs(run: Run) -> object:
    settings = run.job.evaluation
    files = [file_digest(name) for name in settings.benchmarks if name.endswith(YAML) and Path(name).is_file()]
    return [list(settings.benchmarks), settings.precision, *files]


MEASURE = Stage("benchmarks", measure, _inputs, ("export",), (RunFolder.benchmarks,))
