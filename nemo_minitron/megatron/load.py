"""Loads a model from disk: a host builds it, and each rank fills its shards by reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from megatron.core import parallel_state

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.families import family_of
from nemo_minitron.megatron.groups import current_layout
from nemo_minitron.megatron.live import fill
from nemo_minitron.pruning.cut import check_plan
from nemo_minitron.pruning.student import Student
from nemo_minitron.settings.layout import Layout
from nemo_minitron.sources.tensors import ModelSource

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


class Builder(Protocol):
    """What every stage asks of a host."""

    def build(self, config: HfConfig, *, precision: str, layout: Layout) -> list[MegatronModule]:
        """This rank's GPTModel chunks for a Hugging Face config, without weights. `hosts/protocol.py` says the rest."""
        ...


Build = Callable[..., list["MegatronModule"]]  # a host's `build`


def load(
    teacher: ModelSource, plan: PrunePlan | None = None, *, build: Build, compensation: Compensation | None = None,
    precision: str = "fp32", layout: Layout | None = None, sp: bool = False,
) -> list[MegatronModule]:  # fmt: skip
    """This rank's filled chunks of a model, one for each virtual stage; with a `plan`, those of its student.

    A student's tensors are read from its teacher, except those that `compensation` has. If Megatron's parallel groups
    exist and no `layout` is given, the layout is theirs, with sequence parallelism as `sp` says. Collective.

    Raises InputError for a plan or compensation that does not fit the teacher, for a precision or layout that the model
    cannot have, and for a weight that is not finite.
    """
    config = dict(teacher.config)
    if plan is not None:
        check_plan(plan, teacher)
        config = family_of(config).config(plan.target, config, plan.keep.get("layers"))
    if parallel_state.model_parallel_is_initialized():
        layout = layout or current_layout(sp)
    chunks = build(config, precision=precision, layout=layout or Layout())
    fill(chunks, Student(teacher, plan, compensation) if plan else teacher)
    return chunks
