"""`nemo minitron`: the job as commands of NeMo-Run, with the recipes as factories. It loads neither NeMo nor Megatron.

NeMo-Run finds this module through the entry-point group `nemo_run.cli`. A command's parameters are the settings of a
Job and `out`, the run folder: `nemo minitron compress --factory NAME distillation.tokens=2000`. In Python, any executor
runs the same: `run.run(task(compress, job), executor=...)`.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Optional, get_args, get_origin, get_type_hints

import nemo_run as run

from nemo_minitron.artifacts.json_types import JsonFields, JsonObject
from nemo_minitron.cli.find import names
from nemo_minitron.cli.nodes import Machines
from nemo_minitron.errors import InputError
from nemo_minitron.job.compress import run_compress
from nemo_minitron.schema import asked_for
from nemo_minitron.settings.recipe import Job

NAMESPACE = "minitron"
_CLASSES: dict[str, type] = {}  # name -> the class that `_class_of` made
PLAIN = (int, float, str, bool)
TORCHRUN = {  # variables that tell a process about the others
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
# `name` has no annotation: NeMo-Run would take a text that is the name of a factory for that factory.
NAME = inspect.Parameter("name", inspect.Parameter.KEYWORD_ONLY)
OUT = inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Optional[str])


def command(stage: Callable[[Job, Optional[str]], None]) -> Any:
    """Decorator: a function of a Job and its run folder becomes a command of NeMo-Run."""

    @functools.wraps(stage)
    def entry(*, out: Optional[str] = None, **settings: Any) -> None:
        job = Job.from_dict(Job(**settings).as_dict())
        if _leads(job):
            stage(job, out)

    parameters = [p.replace(kind=OUT.kind) for p in signature(Job).parameters.values() if p.name != "name"]
    entry.__signature__ = inspect.Signature([NAME, *parameters, OUT])  # type: ignore[attr-defined]
    run.cli.entrypoint(entry, namespace=NAMESPACE)
    return entry


def task(entry: Any, job: Job, out: str | None = None) -> Any:
    """A `run.Partial` of one of this module's commands, with all settings of a Job. `out`: the run folder."""
    settings = {"out": out} | _written(job)
    for name, value in settings.items():
        group = getattr(job, name, None)
        if dataclasses.is_dataclass(group):
            settings[name] = run.Config(_class_of(type(group)), **_written(group))
        elif isinstance(value, Mapping):
            settings[name] = _open(value)
    return run.Partial(entry, **settings)


def mapping(**values: Any) -> JsonObject:
    """A group of settings with free names, as in `keep.ffn=1024`. NeMo-Run would lose the type of a plain dict."""
    return values


def _open(values: JsonFields) -> Any:
    items = {name: _open(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    return run.Config(mapping, **items)


def _written(values: Any) -> JsonObject:
    """A dataclass' fields as plain values. Empty texts are left to their defaults, since NeMo-Run's files cannot say
    them, and so are sizes that nobody asked for."""
    defaults = {field.name: field.default for field in dataclasses.fields(values)}
    plain = json.loads(json.dumps(dataclasses.asdict(values)))
    left_out = {name for name, value in plain.items() if value == "" and defaults[name] == ""}
    left_out |= {name for name in plain if not asked_for(getattr(values, name))}
    return {name: value for name, value in plain.items() if name not in left_out}


def add_recipe(name: str, recipe: Callable[[], Job]) -> None:
    """Offers a recipe as `--factory NAME` of all commands. Call it in a `workspace.py` for recipes of your own."""
    for entry in (compress, estimate, plan, prune, distill):
        run.cli.factory(_factory(entry, recipe), target=entry, name=name)


def _factory(entry: Any, recipe: Callable[[], Job]) -> Callable[[], Any]:
    @functools.wraps(recipe)
    def make() -> Any:
        return task(entry, recipe())

    make.__doc__ = recipe.__doc__ or getattr(inspect.getmodule(recipe), "__doc__", None)
    return make


def signature(kind: type) -> inspect.Signature:
    """The signature of a dataclass, with annotations that NeMo-Run can read: no texts and no tuples."""
    hints = get_type_hints(kind)
    parameters = inspect.signature(kind).parameters.values()
    return inspect.Signature([p.replace(annotation=_readable(hints[p.name])) for p in parameters])


def _class_of(group: Any) -> Any:
    """A subclass of a group of settings, with the signature that NeMo-Run needs for `distillation.tokens=2000`. It is a
    class of this module: NeMo-Run's files name it nemo_minitron.cli.nemo_run.Distillation."""
    name = group.__name__
    if name not in _CLASSES:
        body = {"__signature__": signature(group), "__doc__": group.__doc__, "__module__": __name__}
        _CLASSES[name] = globals()[name] = type(name, (group,), body)
    return _CLASSES[name]


def _readable(hint: Any) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _class_of(hint)
    origin, items = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return hint
    if origin is tuple and items[0] in PLAIN:
        return list[items[0]]  # type: ignore[valid-type]
    if origin is Mapping:
        return dict[items]  # type: ignore[valid-type, misc]
    if {*items} == {str, type(None)}:
        return Optional[str]
    return Any


def _leads(job: Job) -> bool:
    """Whether this process does the job. Under torchrun the first process does, and starts the workers of each stage.

    Removes torchrun's variables, which would mislead those workers. Raises InputError for processes on several
    machines, or if their number is not the layout's.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    started = int(os.environ["WORLD_SIZE"])
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        raise InputError("torchrun was started on several nodes; leave the launcher out, with one task a node")
    if started not in (1, job.layout.processes):
        raise InputError(
            f"NeMo-Run started {started} processes; the layout has {job.layout.processes}, so ntasks_per_node must be "
            f"{job.layout.processes}, or 1"
        )
    first = os.environ["RANK"] == "0"
    for name in [name for name in os.environ if name in TORCHRUN or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    return first


def _do(job: Job, out: Optional[str], until: str = "") -> None:
    """Runs the job as `minitron compress` does, also if an executor starts it once on each of several nodes."""
    folder = job.folder(out)
    same = ["compress", until, job.as_dict()]
    Machines(job=same).run(job.layout, folder, lambda: run_compress(job, folder, until))


@command
def compress(job: Job, out: Optional[str]) -> None:
    """Run the whole job in one run folder: `out`, or runs/NAME. Run the command again to resume."""
    _do(job, out)


@command
def estimate(job: Job, out: Optional[str]) -> None:
    """Run the job as far as its scores, by forward passes."""
    _do(job, out, "estimate")


@command
def plan(job: Job, out: Optional[str]) -> None:
    """Run the job as far as its plan: what is kept."""
    _do(job, out, "plan")


@command
def prune(job: Job, out: Optional[str]) -> None:
    """Run the job as far as its student before training: checkpoints/pruned."""
    _do(job, out, "prune")


@command
def distill(job: Job, out: Optional[str]) -> None:
    """Run the job as far as its distilled student: student."""
    _do(job, out, "export")


def local() -> Any:
    """This machine. One process starts the processes of each stage, as many as the layout has."""
    return run.Config(run.LocalExecutor)


run.cli.factory(local, target=run.LocalExecutor)
for _name in names():
    add_recipe(_name, importlib.import_module(f"nemo_minitron.recipes.{_name}").recipe)
