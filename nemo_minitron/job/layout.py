"""A layout over processes, and whether Megatron can run a model in it."""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; `sp` is sequence parallelism within a tensor-parallel group."""

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    sp: bool = False

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def check(self, architecture: Architecture) -> None:
        """Raises InputError, with the nearest legal value, for a layout in which Megatron cannot run it."""
        for name in ("tp", "pp", "vp", "cp", "ep", "dp"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not legal_tp(architecture, self.tp):
            raise InputError(
                f"tp={self.tp} does not divide {_sizes(architecture)}; the nearest legal tp is "
                f"{nearest_tp(self.tp, architecture)}"
            )
        stages = self.pp * self.vp
        if architecture.num_layers % stages:
            legal = [n for n in range(1, architecture.num_layers + 1) if architecture.num_layers % n == 0]
            closest = min(legal, key=lambda n: (abs(n - stages), n))
            raise InputError(
                f"{architecture.num_layers} layers do not divide into {stages} pipeline stages "
                f"(pp={self.pp}, vp={self.vp}); the nearest legal number of stages is {closest}"
            )
        if self.vp > 1 and self.pp == 1:
            raise InputError(f"vp={self.vp} needs pp of at least 2; the nearest legal vp is 1")
        if self.ep > 1:
            raise InputError(f"ep={self.ep} needs a mixture of experts; the nearest legal ep is 1")

    def check_sequence(self, length: int) -> None:
        """Raises InputError for a sequence that sequence parallelism cannot divide."""
        if self.sp and length % self.tp:
            nearest = max(1, round(length / self.tp)) * self.tp
            raise InputError(
                f"sequences of {length} tokens do not divide by tp={self.tp}, which sp needs; "
                f"the nearest legal length is {nearest}, or leave sp off"
            )

    def for_student(self, student: Architecture, teacher: Architecture) -> tuple[Layout, str]:
        """The layout nearest to this one that runs both models, and a sentence where it is another.

        A teacher's TP need not divide its student: 1024 of 1536 neurons do not divide by 3.
        """
        if legal_tp(student, self.tp):
            return self, ""
        tp = nearest_tp(self.tp, student, teacher)
        why = f"tp={self.tp} does not divide the student's {_sizes(student)}: it is distilled at tp={tp}"
        return dataclasses.replace(self, tp=tp, sp=self.sp and tp > 1), why


def legal_tp(architecture: Architecture, tp: int) -> bool:
    """Megatron-core 0.15 wants heads, query groups and the MLP's width divisible by TP."""
    sizes = (architecture.num_attention_heads, architecture.num_query_groups, architecture.ffn_hidden_size)
    return all(size % tp == 0 for size in sizes)


def nearest_tp(tp: int, *architectures: Architecture) -> int:
    """The TP closest to `tp` that is legal for all of them; the smaller of two."""
    most = min(architecture.num_query_groups for architecture in architectures)
    legal = [n for n in range(1, most + 1) if all(legal_tp(a, n) for a in architectures)]
    return min(legal, key=lambda n: (abs(n - tp), n))


def _sizes(a: Architecture) -> str:
    return f"{a.num_attention_heads} heads, {a.num_query_groups} query groups and an ffn of {a.ffn_hidden_size}"
