"""A recipe for a user's own model: every size that it leaves open is derived from the model, the text and the machine.

The numbers are those of published runs of this size (docs/method.md); each is a plain value of the recipe, so that a
user sees it and can change it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.costs import training_memory
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.schema import Unasked, UnaskedRate, asked_for
from nemo_minitron.search import parse
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.evaluation import Data, Evaluation
from nemo_minitron.settings.gates import Gates
from nemo_minitron.settings.layout import Layout, legal_tp
from nemo_minitron.settings.own_model import OwnModel
from nemo_minitron.settings.recipe import Job
from nemo_minitron.settings.search import LOSSES, Search
from nemo_minitron.sources.open import config_of

TARGETS = ("params", "memory", "keep")
SMALL = 10**9  # parameters; below it a short training takes the larger learning rate
PROMPTS = (
    "The capital of France is",
    "Once upon a time,",
    "The most important thing about",
)  # teacher and student go on
FULL = 0.8  # share of a GPU's memory that a step may take by our count, which leaves out buffers and the allocator


@dataclasses.dataclass(frozen=True)
class Machine:
    """The GPUs of this machine. `memory`: bytes of the smallest one."""

    gpus: int = 0
    memory: int = 80 * 10**9

    @classmethod
    def here(cls) -> Machine:
        from nemo_minitron.backend import doctor

        megabytes = [int(line.split()[0]) for line in doctor.nvidia_smi("memory.total") if line.split()[0].isdecimal()]
        gpus = len(doctor.cuda_devices())
        return cls(gpus, min(megabytes) * 2**20) if gpus and megabytes else cls(gpus)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much a machine does in a sensible time."""

    tokens: int
    sequence_length: int
    batch: int  # rows of a step, at least
    calibration: int  # rows
    evaluation: int  # tokens
    search: Search


ON_GPUS = Scale(
    tokens=100_000_000, sequence_length=4096, batch=16, calibration=1024, evaluation=262_144,
    search=Search(proxy=LOSSES, candidates=12, distil=4, steps=60, tokens=65_536),
)  # fmt: skip
ON_A_CPU = Scale(
    tokens=200_000, sequence_length=512, batch=1, calibration=32, evaluation=16_384,
    search=Search(proxy=LOSSES, candidates=6, distil=2, steps=30, tokens=4096),
)  # fmt: skip


def job_of(
    model: str, own: OwnModel, machine: Machine, layout: Layout | None = None, overrides: Sequence[str] = ()
) -> Job:
    """The recipe, with the settings `overrides` (key=value). `layout`: the one that the user asked for; None: it is
    derived. Raises InputError for a model that is none, for no text, for none or several sizes, and as `Job.override`.
    """
    wanted = [name for name in TARGETS if getattr(own, name)]
    if not own.data:
        raise InputError(f"'{model}' is a model, and its text is missing; give --data, and a size, e.g. --params 0.7x")
    if len(wanted) != 1:
        given = " and ".join(f"--{name}" for name in wanted) or "no size"
        raise InputError(f"{given} given; give one of --params 0.7x, --memory 8GiB and --keep ffn=1024")
    config = config_of(model)
    source = from_hf(config)
    scale = ON_GPUS if machine.gpus else ON_A_CPU
    length = min(scale.sequence_length, int(config.get("max_position_embeddings") or scale.sequence_length))
    tokens = own.tokens or scale.tokens
    layout = layout or layout_on(machine, source, length)
    job = Job(
        name=_name(model, getattr(own, wanted[0])),
        teacher=model,
        data=_data(own),
        keep=parse.sizes(own.keep) if own.keep else {},
        search=_search(own, source, scale, layout),
        calibration=Calibration(samples=Unasked(scale.calibration), sequence_length=Unasked(length), precision="auto"),
        distillation=_distillation(source, tokens, length, scale, layout),
        evaluation=Evaluation(tokens=scale.evaluation, sequence_length=length, precision="auto", prompts=PROMPTS),
        gates=_gates(machine, source),
        layout=layout,
        base_model=Path(model).name,
    )
    return for_steps(job.override(list(overrides)))


def _distillation(source: Architecture, tokens: int, length: int, scale: Scale, layout: Layout) -> Distillation:
    """The rate falls to its tenth. `for_steps` derives what depends on the number of steps."""
    batch = -(-scale.batch // layout.dp) * layout.dp
    rate = 3e-4 if source.parameters() < SMALL else 1e-4
    return Distillation(
        tokens=tokens, sequence_length=Unasked(length), global_batch_size=Unasked(batch), learning_rate=rate,
        min_learning_rate=UnaskedRate(f"{rate / 10:.3g}"), warmup_steps=Unasked(0), precision="auto",
        save_every=Unasked(1),
    )  # fmt: skip


def _gates(machine: Machine, source: Architecture) -> Gates:
    """In fp32 where a model of four bytes a weight is sure to fit: a GPU's memory is known, a processor's is not."""
    fits = 4 * source.parameters() <= FULL * machine.memory if machine.gpus else source.parameters() < SMALL
    return Gates(precision="fp32" if fits else "auto")


def for_steps(job: Job) -> Job:
    """The job with what the steps of its distillation decide, unless somebody asked for another value: a tenth of them,
    at most 40, warm up, and a quarter of them, at most 100, lie between two checkpoints."""
    settings = job.distillation
    derived = {"warmup_steps": min(40, settings.steps // 10), "save_every": max(1, min(100, settings.steps // 4))}
    wanted: dict[str, Any] = {name: value for name, value in derived.items() if not asked_for(getattr(settings, name))}
    return dataclasses.replace(job, distillation=dataclasses.replace(settings, **wanted))


def layout_on(machine: Machine, source: Architecture, length: int) -> Layout:
    """The least tensor parallelism with which a step of a student as large as its teacher fits; data parallelism
    takes the other GPUs. Where nothing fits, the largest one that divides the model."""
    if machine.gpus < 2:
        return Layout()
    legal = [n for n in range(1, machine.gpus + 1) if machine.gpus % n == 0 and legal_tp(source, n)]
    etp = int(bool(source.num_moe_experts and source.mlp_bias))  # experts with biases are whole
    layouts = [Layout(tp=tp, dp=machine.gpus // tp, sp=tp > 1, etp=etp) for tp in legal]
    for layout in layouts:
        needed = training_memory(source, layout, batch=1, context=length, teacher=source, micro_batches=1)
        if sum(needed.values()) <= FULL * machine.memory:
            return layout
    return layouts[-1]


def _search(own: OwnModel, source: Architecture, scale: Scale, layout: Layout) -> Search:
    """What is searched for: nothing if the sizes are given."""
    if own.keep:
        return Search()
    divisors = f"tp={layout.tp}" if layout.tp > 1 else ""
    search = dataclasses.replace(scale.search, params=own.params, memory=own.memory, divisors=divisors)
    return search.for_model(source)


def _data(own: OwnModel) -> Data:
    """The text, with a part of it held out if no other text is given."""
    from nemo_minitron.data import check_source, prefix_of
    from nemo_minitron.data.files import TEXT, kind_of
    from nemo_minitron.data.text import HELD_OUT, REST, source_of, with_field

    for given in filter(None, (own.data, own.test)):
        check_source(given)
    data = with_field(own.data, own.field)
    source = source_of(data)
    name, split, field = source
    if own.test:
        return Data(train=data, test=with_field(own.test, own.field))
    if source.is_file and kind_of(name) not in TEXT and split is None:
        train, test = (with_field(f"{name}@{part}", field) for part in (REST, HELD_OUT))
        return Data(train=train, test=test)
    if split is not None or prefix_of(name) is not None or Path(name).is_file():
        raise InputError(f"'{own.data}' has no part that can be held out; give held-out text with --test")
    return Data(train=data, test=data)


def _name(model: str, size: str) -> str:
    """`smollm2-135m-instruct` and `0.7x` -> `smollm2-135m-instruct_to_0.7x`."""
    words = re.sub(r"[^\w.-]+", "_", f"{Path(model).resolve().name}_to_{size}")
    return words if words[0].isalpha() else f"model_{words}"
