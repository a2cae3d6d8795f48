"""`--executor`: runs a `minitron` command as one task of NeMo-Run, here, in a container, on Slurm or on SkyPilot.

One task runs all stages. The stages find each other's results in the run folder, and a retry resumes from them.
`minitron` starts the processes of a node itself, so a node has one task, whatever its number of GPUs.

NeMo-Run writes names, folders and the values of environment variables to a batch script without quotes. So this file
quotes them, or refuses those that are not plain words of a shell.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import secrets
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import nemo_run as run
from nemo_run.config import RUNDIR_NAME, get_nemorun_home
from nemo_run.core.execution.base import Executor, import_executor
from nemo_run.core.execution.skypilot import _SKYPILOT_AVAILABLE

from nemo_minitron.artifacts.parse import WORDS, shown
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.launch.connection import SECRET
from nemo_minitron.launch.nodes import Nodes
from nemo_minitron.settings.host import HOST
from nemo_minitron.settings.layout import Layout

Values = dict[str, Any]  # fields of an executor
GPUS = 8  # of a node, if the settings do not say it
# Fields that a setting cannot give, because their values are objects. An executor in executors.py can have them.
OBJECTS = ("packager", "launcher", "tunnel", "job_details", "experiment_id", "job_dir", "dependencies")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The batch script makes a new secret at each start and writes it nowhere. srun gives it to all nodes.
AT_START = "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')"
SIGNAL = "TERM@120"  # two minutes before the end, time to save a checkpoint
SLACK, STAGES = 1.5, 1  # a job's limit: the estimate of its training times SLACK, and hours for the other stages
LEAST = 4  # hours of a limit; the estimate assumes H100s


def executor_of(
    name: str, settings: Iterable[str], layout: Layout, folders: Sequence[Path], hours: float = 0
) -> Executor:
    """NeMo-Run's executor for `--executor NAME`, with the settings `executor.key=value`.

    `name`: a kind in `KINDS`, or the name of an executor in NeMo-Run's `executors.py`. Nodes and GPUs follow from the
    layout if the settings do not give them, and Slurm's time limit from `hours`, the estimate of the training. A
    container sees `folders` under the names that they have here.

    Raises InputError for an executor, a key or a value that does not exist, for a key that is missing, for a layout
    that does not divide over the nodes, and for SkyPilot if it is not installed.
    """
    pairs = [_split(setting) for setting in settings]
    if name not in KINDS:
        return _ready(_changed(_named(name), pairs))
    if name == "skypilot" and not _SKYPILOT_AVAILABLE:
        raise InputError("--executor skypilot needs SkyPilot; install it with: pip install 'nemo_run[skypilot]'")
    kind, complete = KINDS[name]
    values: Values = {"time": time_limit(hours)} if name == "slurm" else {}
    for key, text in pairs:
        _put(values, kind, key, text)
    values = complete(values, layout, [f"{folder}:{folder}" for folder in folders])
    for field in _fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values:
            raise InputError(f"--executor {name} needs executor.{field.name}; give executor.{field.name}=VALUE")
    return _ready(kind(**values))


def _ready(executor: Executor) -> Executor:
    """The executor with the secret of the job's nodes in its environment. Raises InputError if NeMo-Run's folder would
    need quotes in a batch script."""
    home = get_nemorun_home()
    if isinstance(executor, run.SlurmExecutor):
        if shlex.quote(home) != home:
            raise InputError(
                f"NeMo-Run's folder is {shown(home)}, which would need quotes in a batch script; set NEMORUN_HOME to a "
                "path of letters, digits, '.', '_', '-' and '/'"
            )
        executor.env_vars = {SECRET: AT_START, **executor.env_vars}
    elif isinstance(executor, run.SkypilotExecutor):
        executor.env_vars = {SECRET: secrets.token_hex(16), **(executor.env_vars or {})}
    return executor


def _named(name: str) -> Executor:
    """The executor of that name in the user's `executors.py`. Raises InputError if there is none."""
    file = Path(get_nemorun_home(), "executors.py")
    if file.is_file():
        try:
            return import_executor(name)
        except AttributeError:
            pass
    raise InputError(f"there is no executor '{name}', and {file} has none of that name; {nearest(name, KINDS)}")


def _changed(executor: Executor, pairs: Iterable[tuple[str, str]]) -> Executor:
    """The executor with these settings. The keys of a dict are added to those that it has."""
    values: Values = {}
    for key, text in pairs:
        _put(values, type(executor), key, text)
    for key, value in values.items():
        setattr(executor, key, {**getattr(executor, key), **value} if isinstance(value, dict) else value)
    return executor


# -- settings ------------------------------------------------------------------------------------------
def _split(setting: str) -> tuple[str, str]:
    """(key, text) of `executor.key=text`."""
    key, separator, text = setting.removeprefix("executor.").partition("=")
    if not separator:
        raise InputError(f"'{setting}' is not a setting; write executor.key=value, for example executor.account=NAME")
    return key, text


def _fields(kind: type[Executor]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.init and field.name not in OBJECTS]


def _put(values: Values, kind: type[Executor], key: str, text: str) -> None:
    """Adds one setting to `values`, such as `account=a`, `container_mounts=/a:/a,/b:/b`, `env_vars.NCCL_DEBUG=INFO`.

    `kind`: the class of the executor. Raises InputError for a key that the class does not have, and for a value that
    the field cannot have or that could add a line to the batch script.
    """
    fields, (name, _, inner) = {field.name: _kinds(field.type) for field in _fields(kind)}, key.partition(".")
    if name not in fields or (inner and dict not in fields[name]):
        raise InputError(f"the executor has no key '{key}'; {nearest(name, fields)}")
    if not text.isprintable():  # in a comment of the batch script, a second line would be a command
        raise InputError(f"executor.{key} is {shown(text)}; it must be one line without control characters")
    if name == "env_vars" and inner and not VARIABLE.fullmatch(inner):
        raise InputError(f"executor.{name} names {shown(inner)}; a variable must have letters, digits and '_' alone")
    if inner:
        quoted = name == "env_vars" and kind is run.SlurmExecutor
        values.setdefault(name, {})[inner] = shlex.quote(text) if quoted else text
    else:
        values[name] = _value(key, fields[name], text)


def _kinds(hint: object) -> dict[type, object]:
    """The types that a field may have, as {plain type: full type}: `Optional[list[int]]` gives {list: list[int]}."""
    hints = get_args(hint) if get_origin(hint) is Union else (hint,)
    return {get_origin(one) or one: one for one in hints if one is not type(None)}


def _value(key: str, kinds: Mapping[type, object], text: str) -> object:
    """The value that a text stands for. A list may be written with commas. Raises InputError if the text stands for
    none of these types."""
    if list in kinds and not text.startswith("["):
        return [_value(key, _kinds(get_args(kinds[list])[0]), part) for part in text.split(",")]
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if type(value) in kinds:
        return value
    if str not in kinds:
        raise InputError(f"executor.{key} is '{text}'; it must be {' or '.join(kind.__name__ for kind in kinds)}")
    return text


# -- settings that the user did not give -----------------------------------------------------------------
def _local(given: Values, layout: Layout, mounts: list[str]) -> Values:
    return given


def _docker(given: Values, layout: Layout, mounts: list[str]) -> Values:
    shared = {"ipc_mode": "host", "ulimits": ["memlock:-1", "stack:67108864"]}  # NVIDIA's containers ask for these
    values = {"num_gpus": layout.processes, "packager": run.Packager(), **shared, **given}
    return values | {"volumes": [*mounts, *given.get("volumes", [])]}


def _slurm(given: Values, layout: Layout, mounts: list[str]) -> Values:
    nodes, each = _spread(given, layout, "nodes")
    values = {"nodes": nodes, "gpus_per_node": each, "packager": run.Packager(), "signal": SIGNAL, **given}
    # `executor.gpus_per_node=0` is for a cluster without GPUs, whose Slurm refuses a request for them.
    values |= {"ntasks_per_node": 1, "gpus_per_node": values["gpus_per_node"] or None}
    if "container_image" in given:
        values["container_mounts"] = [*mounts, *given.get("container_mounts", [])]
    return values


def time_limit(hours: float) -> str:
    """Slurm's time limit of a job whose training is estimated to take so many hours."""
    days, rest = divmod(max(LEAST, math.ceil(SLACK * hours + STAGES)), 24)
    return f"{days}-" * bool(days) + f"{rest:02d}:00:00"


def _skypilot(given: Values, layout: Layout, mounts: list[str]) -> Values:
    nodes, each = _spread(given, layout, "num_nodes")
    return {"num_nodes": nodes, "gpus_per_node": each, **given}


def _spread(given: Values, layout: Layout, key: str) -> tuple[int, int]:
    """(nodes, processes of a node) for a layout. Raises InputError if its processes do not divide over the nodes."""
    nodes = given.get(key) or -(-layout.processes // (given.get("gpus_per_node") or GPUS))
    Nodes(nodes).check(layout)
    return nodes, layout.processes // nodes


KINDS = {  # name -> NeMo-Run's class, and the function that completes its settings
    "local": (run.LocalExecutor, _local), "docker": (run.DockerExecutor, _docker),
    "slurm": (run.SlurmExecutor, _slurm), "skypilot": (run.SkypilotExecutor, _skypilot),
}  # fmt: skip


# -- the task ------------------------------------------------------------------------------------------
def script(executor: Executor, arguments: Sequence[str]) -> run.Script:
    """NeMo-Run's script for a `minitron` command. It runs in this folder, or on SkyPilot in the copy of the repository.

    `arguments`: the words behind `minitron`, without `--host`. A host that is named here is named there; otherwise the
    container's own is used.
    """
    contained = getattr(executor, "container_image", None) or isinstance(executor, run.SkypilotExecutor)
    minitron = "minitron" if contained else f"{shlex.quote(sys.executable)} -m nemo_minitron.cli"
    here = "" if isinstance(executor, run.SkypilotExecutor) else f"cd {shlex.quote(os.getcwd())}\n"
    named = os.environ.get(HOST, "")
    host = f"export {HOST}={shlex.quote(named)}\n" if named else ""
    return run.Script(inline=f"{here}{host}exec {minitron} {shlex.join(arguments)}\n")


def _check_name(name: str) -> None:
    """Raises InputError for a task's name that a batch script could not have without quotes."""
    if not WORDS.fullmatch(name):
        raise InputError(f"the task's name {shown(name)} must have letters, digits, '.', '_' and '-' alone")


def submit(executor: Executor, name: str, arguments: Sequence[str]) -> None:
    """Starts the task and waits for its end. It does not wait for a task on Slurm or SkyPilot, which needs no process
    here. Raises RuntimeError if the task failed, and InputError for a name that is not a plain word."""
    _check_name(name)
    with run.Experiment(name, executor=executor, log_level="WARN", enable_goodbye_message=False) as experiment:
        experiment.add(script(executor, arguments), name=name)
        detached = isinstance(executor, (run.SlurmExecutor, run.SkypilotExecutor))
        experiment.run(detach=detached, tail_logs=not detached)
    state = experiment.jobs[0].state
    if not detached and state.name != "SUCCEEDED":
        raise RuntimeError(f"the task ended as {state.name}; its logs are in {experiment._exp_dir}")


def dry_run(executor: Executor, name: str, arguments: Sequence[str]) -> str:
    """The text of what `submit` would start: the batch script (its file is written), the container's command, or the
    command. Raises InputError for a name that is not a plain word."""
    _check_name(name)
    with run.Experiment(name, executor=executor, log_level="ERROR", clean_mode=True) as experiment:
        task = script(executor, arguments)
        experiment.add(task, name=name)
        experiment.dryrun(log=False, delete_exp_dir=False)
        job, folder = experiment.jobs[0], Path(experiment._exp_dir)
    lines = [task.inline.rstrip()]
    for file in sorted(folder.glob("*_sbatch.sh")):
        lines += [f"\n{file}:", file.read_text().rstrip(), "", f"sbatch --requeue --parsable {file}"]
    if isinstance(executor, run.DockerExecutor):
        lines += ["", docker_command(job._dryrun_info.request.containers[0], job.executor.job_dir)]
    return "\n".join(lines)


def docker_command(container: Any, job_folder: str) -> str:
    """The `docker run` command that does what NeMo-Run asks Docker's engine for."""
    executor, words = container.executor, ["docker", "run", "--rm", "--name", container.name]
    plain = {"--runtime": executor.runtime, "--shm-size": executor.shm_size, "--ipc": executor.ipc_mode}
    count = executor.num_gpus
    plain |= {"--network": executor.network, "--gpus": ("all" if count == -1 else count) or None}
    words += [word for flag, value in plain.items() if value for word in (flag, str(value))]
    for kind in executor.ulimits:
        name, _, limits = kind.partition(":")
        words += ["--ulimit", f"{name}={limits}"]
    for volume in [*executor.volumes, f"{job_folder}:/{RUNDIR_NAME}"]:
        words += ["-v", volume]
    for key, value in (executor.env_vars | container.extra_env).items():
        words += ["-e", f"{key}={value}"]
    words += ["-w", f"/{RUNDIR_NAME}/code", executor.container_image, *container.command]
    return shlex.join(words)
