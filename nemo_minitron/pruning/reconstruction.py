"""Which sub-blocks of a student are fitted as a whole, and how a fitted one becomes the student's tensors.

A cut of neurons is fitted by itself: the MLPs with the kept neurons read and write all hidden channels of the teacher,
in all its layers that stay. The student's tensors are those of the fitted MLPs, less the hidden channels that the plan
cuts. This is how the least squares treat a plan that cuts several axes, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.axes import axis, split_name
from nemo_minitron.pruning.selection import shapes_of

MATRICES = ("gate.weight", "up.weight", "down.weight")  # of a dense MLP
HIDDEN_DIM = {"gate.weight": 1, "up.weight": 1, "down.weight": 0}


def can_reconstruct(plan: PrunePlan) -> bool:
    """Whether the plan leaves MLPs to fit: it cuts the neurons of dense ones."""
    return "ffn" in plan.keep


def neurons_alone(plan: PrunePlan) -> PrunePlan:
    """The same cut of neurons and no other. A layer that the plan drops keeps its first neurons; it is not fitted."""
    size = plan.target.ffn_hidden_size
    kept = {layer: plan.keep["ffn"].get(layer, list(range(size))) for layer in axis("ffn").layers_of(plan.source)}
    target = plan.source.replace(ffn_hidden_size=size)
    return PrunePlan(plan.source, target, {"ffn": kept}, model_digest=plan.model_digest)


def fitted_names(plan: PrunePlan) -> Iterator[tuple[str, str]]:
    """(student's tensor, the tensor of `neurons_alone` that it is cut from) of each matrix that is fitted."""
    for name in shapes_of(plan.target):
        layer, local = split_name(name)
        if layer is not None and local in MATRICES:
            yield name, f"layers.{plan.kept_layers[layer]}.{local}"


def of_student(plan: PrunePlan, name: str, fitted: np.ndarray) -> np.ndarray:
    """The student's tensor: `fitted`, fp32, less the hidden channels that the plan cuts."""
    hidden = plan.indices("hidden")
    return fitted if hidden is None else np.take(fitted, hidden, axis=HIDDEN_DIM[split_name(name)[1]])
