"""Which sub-blocks of a student are fitted as a whole, and how a fitted one becomes the student's tensors.

A sub-block is what writes to the residual stream at once: attention, an MLP, a mixture of experts, a Mamba mixer. It is
fitted if the plan cuts units in it, and by itself: it reads and writes all hidden channels of the teacher, in a student
with all of the teacher's layers. The student's tensors are those of the fitted sub-blocks, less the hidden channels
that the plan cuts. This is how the least squares treat a plan that cuts several axes, too. Routers stay as they are
cut, because a router's choice has no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.axes import axis, owners, split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.selection import shapes_of

SHARES = "held-out error of each sub-block, as a share of its start's"  # among a Compensation's notes


@dataclasses.dataclass(frozen=True)
class SubBlock:
    """`module`: its name in Megatron's layer. `axes`: those whose cut takes units out of it. `matrices`: the canonical
    tensors that are fitted, without their layer's number."""

    name: str
    module: str
    axes: tuple[str, ...]
    matrices: tuple[str, ...]


def _weights(*names: str, of: str = "") -> tuple[str, ...]:
    return tuple(f"{of}{name}.weight" for name in names)


ATTENTION = SubBlock("attention", "self_attention", ("heads", "query_groups"), _weights("q", "k", "v", "o"))
MLP = SubBlock("MLP", "mlp", ("ffn",), _weights("gate", "up", "down"))
EXPERTS = SubBlock(
    "experts",
    "mlp",
    ("experts", "experts_per_token", "expert_ffn", "shared_expert_ffn"),
    _weights("gate", "up", "down", of="experts.{e}.") + _weights("gate", "up", "down", of="shared_expert."),
)
MAMBA = SubBlock(
    "Mamba", "mixer", ("mamba_heads", "mamba_head_dim"), _weights("z", "x", "b", "c", "dt", "out")
)  # fmt: skip
SUB_BLOCKS = (ATTENTION, MLP, EXPERTS, MAMBA)


def cut_blocks(source: Architecture, target: Architecture) -> list[SubBlock]:
    """The kinds of sub-blocks that lose units. Attention with latents is none of them: it is not fitted."""

    def loses(block: SubBlock) -> bool:
        return any(0 < axis(name).length(target) < axis(name).length(source) for name in block.axes)

    return [block for block in SUB_BLOCKS if loses(block) and not (block is ATTENTION and source.kv_lora_rank)]


def fitted_by(blocks: Sequence[SubBlock], name: str) -> SubBlock | None:
    """The kind among `blocks` of which this canonical tensor is a matrix."""
    layer, local = split_name(name)
    _, pattern = split_expert(local)
    return None if layer is None else next((block for block in blocks if pattern in block.matrices), None)


def check_reconstruction(source: Architecture, target: Architecture) -> None:
    """Raises InputError if a cut leaves no sub-block to fit."""
    if not cut_blocks(source, target):
        raise InputError(
            "reconstruct fits sub-blocks that lost units, and here none does; leave it out. Sub-blocks are attention "
            "without latents, MLPs, experts and Mamba mixers"
        )


def within(source: Architecture, target: Architecture) -> Architecture:
    """The source with the target's sizes inside the sub-blocks that are fitted, and no other cut."""
    axes = [axis(name) for block in cut_blocks(source, target) for name in block.axes]
    return source.replace(**{cut.size: getattr(target, cut.size) for cut in axes if cut.length(target)})


def cut_within(plan: PrunePlan) -> PrunePlan:
    """The plan's cut inside the sub-blocks that are fitted, and no other. A layer that the plan drops is cut like the
    first that stays and has the same axis; it is not fitted."""
    names = [name for block in cut_blocks(plan.source, plan.target) for name in block.axes if name in plan.keep]
    target = within(plan.source, plan.target)
    keep = {name: _in_all_layers(plan, name) for name in names}
    return PrunePlan(plan.source, target, keep, model_digest=plan.model_digest)


def _in_all_layers(plan: PrunePlan, name: str) -> list[int] | dict[int, list[int]]:
    kept = plan.keep[name]
    if not axis(name).per_layer:
        return kept
    first = next(iter(kept.values()))
    return {layer: kept.get(layer, first) for layer in axis(name).layers_of(plan.source)}


def fitted_blocks(plan: PrunePlan, filled: Collection[str] = ()) -> dict[int, list[SubBlock]]:
    """The teacher's layer -> its sub-blocks that are fitted. `filled`: as in `fitted_matrices`."""
    found: dict[int, list[SubBlock]] = {}
    for _, origin, block in fitted_matrices(plan, filled):
        of_layer = found.setdefault(int(origin.split(".")[1]), [])
        of_layer += [block] if block not in of_layer else []
    return found


def fitted_matrices(plan: PrunePlan, filled: Collection[str] = ()) -> Iterator[tuple[str, str, SubBlock]]:
    """(student's tensor, the tensor of `cut_within` that it is cut from, its sub-block) of each that is fitted.
    `filled`: the student's matrices that fill gaps. Their sub-blocks write more than the teacher's, so none of their
    matrices is fitted."""
    blocks = cut_blocks(plan.source, plan.target)
    left = {(name.split(".")[1], fitted_by(blocks, name)) for name in filled}
    for name in shapes_of(plan.target):
        if (block := fitted_by(blocks, name)) is not None and (name.split(".")[1], block) not in left:
            layer, local = split_name(name)
            yield name, f"layers.{plan.kept_layers[layer or 0]}.{local}", block


def of_student(plan: PrunePlan, name: str, fitted: np.ndarray) -> np.ndarray:
    """The student's tensor: `fitted`, fp32, less the hidden channels that the plan cuts."""
    hidden = plan.indices("hidden")
    dim = next(row.dim for cut, row in owners(name) if cut.name == "hidden")
    return fitted if hidden is None else np.take(fitted, hidden, axis=dim)
