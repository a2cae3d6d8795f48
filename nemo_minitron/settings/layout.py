"""A layout over processes, and whether Megatron can run a model in it."""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.schema import LAYOUT, setting, settings_of

MOST = 1 << 20  # ranks: more than any machine has


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions, as Megatron has them.

    `sp` is sequence parallelism within a tensor-parallel group, `etp` the tensor parallelism of experts (as
    `tp` where it is left 0). Experts are spread over `ep` of the ranks that tensor, context and data
    parallelism give. `first_stage` and `last_stage`: layers of the first and last pipeline stage where the
    stages are uneven; 0 for even.
    """

    tp: int = setting(1, "Tensor-parallel size.", most=MOST, panel=LAYOUT)
    pp: int = setting(1, "Pipeline stages.", most=MOST, panel=LAYOUT)
    vp: int = setting(1, "Virtual stages a pipeline stage.", most=MOST, panel=LAYOUT)
    cp: int = setting(1, "Context-parallel size: ranks that share a sequence.", most=MOST, panel=LAYOUT)
    ep: int = setting(1, "Expert-parallel size, of mixtures of experts.", most=MOST, panel=LAYOUT)
    dp: int = setting(1, "Data-parallel size.", most=MOST, panel=LAYOUT)
    sp: bool = setting(False, "Sequence parallelism within tensor-parallel groups.", panel=LAYOUT)
    etp: int = setting(0, "Tensor-parallel size of experts; 0: as --tp.", least=0, most=MOST, panel=LAYOUT)
    first_stage: int = setting(0, "Layers of the first pipeline stage; 0: even.", least=0, most=MOST, panel=LAYOUT)
    last_stage: int = setting(0, "Layers of the last pipeline stage; 0: even.", least=0, most=MOST, panel=LAYOUT)

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        return self.etp or self.tp

    def check(self, architecture: Architecture, training: bool = False) -> None:
        """Raises InputError, with the nearest legal value, for a layout in which Megatron cannot run (or train) it."""
        for name, known in SIZES.items():
            value, least = getattr(self, name), known.least
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}, at most {MOST}")
        if not legal_tp(architecture, self.tp):
            raise InputError(
                f"tp={self.tp} does not divide {_sizes(architecture)}; the nearest legal tp is "
                f"{nearest_tp(self.tp, architecture)}"
            )
        if self.vp > 1 and self.pp == 1:
            raise InputError(f"vp={self.vp} needs pp of at least 2; the nearest legal vp is 1")
        self._check_stages(architecture.num_layers)
        self._check_experts(architecture)
        if architecture.num_moe_experts and self.tp > 1 and not self.sp and (training or self.ep > 1):
            what = "training a mixture of experts" if training else f"ep={self.ep}"
            raise InputError(f"{what} at tp={self.tp} needs sequence parallelism; set sp, or the nearest legal tp is 1")

    def _check_stages(self, layers: int) -> None:
        if self.first_stage or self.last_stage:
            self._check_uneven(layers)
            return
        stages = self.pp * self.vp
        if layers % stages:
            closest = _nearest(stages, [n for n in range(1, layers + 1) if layers % n == 0])
            raise InputError(
                f"{layers} layers do not divide into {stages} pipeline stages (pp={self.pp}, vp={self.vp}); the "
                f"nearest legal number of stages is {closest}, or say how many layers the first or last one has"
            )

    def _check_uneven(self, layers: int) -> None:
        """Megatron wants the other stages equal, and every stage divisible by its virtual stages."""
        ends = [n for n in (self.first_stage, self.last_stage) if n]
        rest, stages = layers - sum(ends), self.pp - len(ends)
        if self.pp < 2 or stages < 0 or rest < stages or (rest % stages if stages else rest):
            raise InputError(
                f"{layers} layers with first_stage={self.first_stage} and last_stage={self.last_stage} leave {rest} "
                f"for {stages} stages of pp={self.pp}; those must share them evenly, or leave both 0"
            )
        if any(n % self.vp for n in (*ends, rest // max(1, stages))):
            raise InputError(f"stages of {ends} layers do not divide into vp={self.vp}; the nearest legal vp is 1")

    def _check_experts(self, architecture: Architecture) -> None:
        experts = getattr(architecture, "num_moe_experts", None)
        for name, value in (("ep", self.ep), ("etp", self.etp)):
            if not experts and value > 1:
                raise InputError(f"{name}={value} needs a mixture of experts; the nearest legal {name} is 1")
        if not experts:
            return
        if experts % self.ep:
            legal = _nearest(self.ep, [n for n in range(1, experts + 1) if experts % n == 0])
            raise InputError(f"{experts} experts do not divide over ep={self.ep}; the nearest legal ep is {legal}")
        ranks = self.tp * self.cp * self.dp
        if ranks % self.expert_tp:
            legal = _nearest(self.expert_tp, [n for n in range(1, ranks + 1) if ranks % n == 0])
            raise InputError(
                f"etp={self.expert_tp} does not divide tp*cp*dp={ranks} ranks; the nearest legal etp is {legal}"
            )
        if ranks % (self.ep * self.expert_tp):
            legal = _nearest(self.ep, [n for n in range(1, ranks + 1) if ranks % (n * self.expert_tp) == 0])
            raise InputError(
                f"ep={self.ep} with experts' tp={self.expert_tp} does not divide tp*cp*dp={ranks} ranks; the nearest "
                f"legal ep is {legal}"
            )

    def check_sequence(self, length: int) -> None:
        """Raises InputError for a sequence that sequence or context parallelism cannot divide."""
        parts = (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sp else 1)
        if length % parts:
            why = " and ".join([f"tp={self.tp}, which sp needs"] * self.sp + [f"2*cp={2 * self.cp}"] * (self.cp > 1))
            raise InputError(
                f"sequences of {length} tokens do not divide by {why}; the nearest legal length is "
                f"{max(1, round(length / parts)) * parts}"
            )

    def for_student(self, student: Architecture, teacher: Architecture) -> tuple[Layout, str]:
        """The layout nearest to this one that runs both models, and a sentence where it is another.

        A teacher's TP need not divide its student: 1024 of 1536 neurons do not divide by 3. The pipeline's stages
        are the student's; a teacher of another depth divides by its own (`for_depth`).
        """
        own = self.for_depth(student.num_layers)
        if legal_tp(student, self.tp):
            return own, ""
        tp = nearest_tp(self.tp, student, teacher)
        why = f"tp={self.tp} does not divide the student's {_sizes(student)}: it is distilled at tp={tp}"
        return dataclasses.replace(own, tp=tp, sp=self.sp and tp > 1), why

    def for_depth(self, layers: int) -> Layout:
        """This layout with stages for so many layers: as they are where they fit, even where the layers divide,
        else with a first and a last stage of another size, as even as Megatron can have them.

        Where there is no such layout it is the even one, which `check` refuses.
        """
        even = dataclasses.replace(self, first_stage=0, last_stage=0)
        for layout in (self, even):
            if layout._has_stages_of(layers):
                return layout
        sizes = range(self.vp, layers, self.vp)
        uneven = [dataclasses.replace(self, first_stage=f, last_stage=z) for f in sizes for z in (0, *sizes)]
        legal = [layout for layout in uneven if layout._has_stages_of(layers)]
        return min(legal, key=lambda layout: layout._spread(layers), default=even)

    def _spread(self, layers: int) -> int:
        """Layers of the largest stage above those of the smallest, where the ends are given."""
        ends = [n for n in (self.first_stage, self.last_stage) if n]
        others = self.pp - len(ends)
        sizes = [*ends, (layers - sum(ends)) // others] if others else ends
        return max(sizes) - min(sizes)

    def _has_stages_of(self, layers: int) -> bool:
        try:
            self._check_stages(layers)
        except InputError:
            return False
        return True


SIZES = {name: known for name, known in settings_of(Layout).items() if name != "sp"}


def legal_tp(architecture: Architecture, tp: int) -> bool:
    """Megatron-core 0.15 wants heads, query groups and the MLP's width divisible by TP."""
    sizes = (architecture.num_attention_heads, architecture.num_query_groups, architecture.ffn_hidden_size)
    return all(size % tp == 0 for size in sizes)


def nearest_tp(tp: int, *architectures: Architecture) -> int:
    """The TP closest to `tp` that is legal for all of them; the smaller of two."""
    most = min(architecture.num_query_groups for architecture in architectures)
    return _nearest(tp, [n for n in range(1, most + 1) if all(legal_tp(a, n) for a in architectures)])


def _nearest(value: int, legal: list[int]) -> int:
    return min(legal, key=lambda n: (abs(n - value), n))


def _sizes(a: Architecture) -> str:
    return f"{a.num_attention_heads} heads, {a.num_query_groups} query groups and an ffn of {a.ffn_hidden_size}"
