"""How processes divide a model and its data, and whether Megatron can run a model so."""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.schema import LAYOUT, setting, settings_of

MOST = 1 << 20  # ranks: more than any job has


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions, as Megatron defines them.

    `sp` is sequence parallelism within a tensor-parallel group. `etp` is the tensor parallelism of experts; 0 means as
    `tp`. Experts are spread over `ep` of the tp * cp * dp ranks of a pipeline stage. `first_stage` and `last_stage`:
    the numbers of layers of the first and the last pipeline stage, if the stages are uneven; 0 means even.
    """

    tp: int = setting(1, "Tensor-parallel size.", most=MOST, panel=LAYOUT)
    pp: int = setting(1, "Pipeline stages.", most=MOST, panel=LAYOUT)
    vp: int = setting(1, "Virtual stages in each pipeline stage.", most=MOST, panel=LAYOUT)
    cp: int = setting(1, "Context-parallel size: ranks that share a sequence.", most=MOST, panel=LAYOUT)
    ep: int = setting(1, "Expert-parallel size, for mixtures of experts.", most=MOST, panel=LAYOUT)
    dp: int = setting(1, "Data-parallel size.", most=MOST, panel=LAYOUT)
    sp: bool = setting(False, "Sequence parallelism within tensor-parallel groups.", panel=LAYOUT)
    etp: int = setting(0, "Tensor-parallel size of experts; 0: as --tp.", least=0, most=MOST, panel=LAYOUT)
    first_stage: int = setting(
        0, "Layers of the first pipeline stage; 0: as the others.", least=0, most=MOST, panel=LAYOUT
    )
    last_stage: int = setting(
        0, "Layers of the last pipeline stage; 0: as the others.", least=0, most=MOST, panel=LAYOUT
    )

    @property
    def processes(self) -> int:
        """Ranks of the layout; expert parallelism adds none."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size of the experts."""
        return self.etp or self.tp

    def check(self, architecture: Architecture, training: bool = False) -> None:
        """Raises InputError, with the nearest legal value, if Megatron cannot run (or train) the model so."""
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
        self._check_hybrid(architecture)
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
                f"nearest legal number of stages is {closest}; or set first_stage or last_stage"
            )

    def _check_uneven(self, layers: int) -> None:
        """Megatron needs the other stages equal, and every stage divisible by its virtual stages."""
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
        if architecture.mlp_bias and self.expert_tp > 1:
            raise InputError(f"experts with biases are whole, not split in {self.expert_tp}; set etp=1 (--etp 1)")
        for name, parts in (("moe_ffn_hidden_size", self.expert_tp), ("moe_shared_expert_intermediate_size", self.tp)):
            if (width := getattr(architecture, name) or 0) % parts:
                legal = _nearest(parts, [n for n in range(1, width + 1) if width % n == 0])
                raise InputError(f"{name} is {width}, which {parts} ranks cannot divide; the nearest legal is {legal}")
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

    def _check_hybrid(self, architecture: Architecture) -> None:
        """Megatron's hybrid model has no virtual stages. Under CP ranks share the Mamba heads of a rank."""
        if not architecture.hybrid_pattern:
            return
        if self.vp > 1:
            raise InputError(f"vp={self.vp} is not possible in a hybrid with Mamba; the nearest legal vp is 1")
        heads, groups = ((getattr(architecture, f"mamba_num_{n}") or 0) // self.tp for n in ("heads", "groups"))
        legal = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
        if self.cp not in legal:
            raise InputError(
                f"{heads} Mamba heads in {groups} groups on each rank do not divide over cp={self.cp}; the nearest "
                f"legal cp is {_nearest(self.cp, legal)}"
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

    def check_student(self, student: Architecture, teacher: Architecture) -> None:
        """Raises InputError, as `check`, if the layout nearest to this one cannot train the student."""
        self.for_student(student, teacher)[0].check(student, training=True)

    def for_student(self, student: Architecture, teacher: Architecture) -> tuple[Layout, str]:
        """(the layout nearest to this one that runs both models, a sentence if it is another one, else "").

        The teacher's TP may not divide the student: 1024 of 1536 neurons do not divide by 3. The pipeline stages are
        the student's; a teacher of another depth has stages of its own (`for_depth`).
        """
        staged = self.for_depth(student.num_layers)
        if legal_tp(student, self.tp):
            return staged, ""
        tp = nearest_tp(self.tp, student, teacher)
        why = f"tp={self.tp} does not divide the student's {_sizes(student)}, so it is distilled at tp={tp}"
        return dataclasses.replace(staged, tp=tp, sp=self.sp and tp > 1), why

    def for_depth(self, layers: int) -> Layout:
        """This layout with pipeline stages for `layers` layers. The stages stay if they fit. Else they become even if
        the layers divide evenly. Else the first and the last stage get another size, as even as Megatron can run them.

        If no layout fits, the result is the even one, which `check` refuses.
        """
        even = dataclasses.replace(self, first_stage=0, last_stage=0)
        for layout in (self, even):
            if layout._has_stages_of(layers):
                return layout
        sizes = range(self.vp, layers, self.vp)  # each stage must divide into its virtual stages
        uneven = [dataclasses.replace(self, first_stage=f, last_stage=z) for f in sizes for z in (0, *sizes)]
        legal = [layout for layout in uneven if layout._has_stages_of(layers)]
        return min(legal, key=lambda layout: layout._spread(layers), default=even)

    def _spread(self, layers: int) -> int:
        """Layers of the largest stage minus layers of the smallest."""
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
    """Whether TP divides heads, query groups and the MLP's width, as Megatron-core 0.15 needs. In multi-latent
    attention every rank has the latents, and makes its own heads' keys and values of them."""
    sizes = (architecture.num_attention_heads, _groups(architecture), architecture.ffn_hidden_size)
    mamba = (architecture.mamba_num_heads, architecture.mamba_num_groups) if architecture.hybrid_pattern else ()
    return all((size or 0) % tp == 0 for size in (*sizes, *mamba))


def nearest_tp(tp: int, *architectures: Architecture) -> int:
    """The TP closest to `tp` that is legal for all of these models; the smaller one of two that are equally close."""
    most = min(_groups(architecture) for architecture in architectures)
    return _nearest(tp, [n for n in range(1, most + 1) if all(legal_tp(a, n) for a in architectures)])


def _nearest(value: int, legal: list[int]) -> int:
    return min(legal, key=lambda n: (abs(n - value), n))


def _groups(a: Architecture) -> int:
    """The parts of attention that TP deals out among its ranks."""
    return a.num_attention_heads if a.kv_lora_rank else a.num_query_groups


def _sizes(a: Architecture) -> str:
    more = f", {a.mamba_num_heads} Mamba heads in {a.mamba_num_groups} groups" if a.hybrid_pattern else ""
    more = more if a.kv_lora_rank else f", {a.num_query_groups} query groups{more}"
    return f"{a.num_attention_heads} heads{more} and an ffn of {a.ffn_hidden_size}"
