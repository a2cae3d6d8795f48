"""Which intermediate states of the student learn from which of the teacher's. Plain data: no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nemo_minitron.errors import InputError, nearest

AUTO = "auto"
EMBEDDING = "embedding"
KINDS = (EMBEDDING, "attention", "mlp", "block")
THIRD_FROM_LAST = 3  # the pair that helped most between 16 and 32 layers (2407.14679, section 4.4)

Point = tuple[str, int]  # a kind of state and its 0-based layer, -1 for the embedding


@dataclasses.dataclass(frozen=True)
class Pair:
    """A state of the student, and the state of the teacher that it is compared with. Layers are 0-based."""

    kind: str
    student: int
    teacher: int

    def __str__(self) -> str:
        return self.kind if self.kind == EMBEDDING else f"{self.kind}:{self.student}:{self.teacher}"


def layer_map(
    text: str, student_layers: int, teacher_layers: int, kept: Sequence[int] | None = None
) -> tuple[Pair, ...]:
    """ "auto", or pairs such as "embedding,attention:3:5,mlp:3:5,block:13:29" (kind:student:teacher) -> pairs.

    `kept`: the teacher's layers that the student has, as a plan lists them. "auto" needs them, unless both models have
    the same depth. Raises InputError for an item that names no state of these models.
    """
    if text == AUTO:
        if kept is None and student_layers == teacher_layers:
            kept = range(teacher_layers)
        if kept is None:
            raise InputError(
                f"the student has {student_layers} layers of the teacher's {teacher_layers} and no plan says which; "
                f"give the plan, or pairs such as block:{student_layers - 1}:{teacher_layers - 1}"
            )
        return automatic(kept, teacher_layers)
    pairs = tuple(dict.fromkeys(_pair(item.strip()) for item in text.split(",")))
    for pair in pairs:
        for whose, count in (("student", student_layers), ("teacher", teacher_layers)):
            layer = getattr(pair, whose)
            if layer >= count:
                raise InputError(f"'{pair}' names layer {layer} of the {whose}, whose last is {count - 1}")
    return pairs


def automatic(kept: Sequence[int], teacher_layers: int) -> tuple[Pair, ...]:
    """The embedding, and the output of each layer in front of a gap.

    Its target is what the layer behind the gap read in the teacher. If there is no gap, because only widths were cut,
    the third block from the end is taken.
    """
    # Student's layer i -> the teacher's layer whose output the student's next layer read.
    targets = [following - 1 for following in (*kept[1:], teacher_layers)]
    gaps = [i for i, (layer, target) in enumerate(zip(kept, targets, strict=True)) if layer != target]
    chosen = gaps or [max(0, len(kept) - THIRD_FROM_LAST)]
    return Pair(EMBEDDING, -1, -1), *(Pair("block", i, targets[i]) for i in chosen)


def _pair(item: str) -> Pair:
    kind, *layers = item.split(":")
    if kind not in KINDS:
        raise InputError(f"'{item}' names no intermediate state; {nearest(kind, KINDS)}")
    if kind == EMBEDDING and not layers:
        return Pair(kind, -1, -1)
    if len(layers) != 2 or not all(layer.isdecimal() for layer in layers):
        legal = kind if kind == EMBEDDING else f"{kind}:STUDENT_LAYER:TEACHER_LAYER, such as {kind}:3:5"
        raise InputError(f"'{item}' is no pair of layers; write {legal}")
    return Pair(kind, int(layers[0]), int(layers[1]))
