"""What training and scoring cost on one rank of a layout: weights, gradients, optimizer, activations, teacher."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from typing import Protocol

from nemo_minitron import hybrid, latents
from nemo_minitron.architecture import BYTES, Architecture
from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.precisions import FP8, weights_in

RECOMPUTE = ("none", "selective", "full")
_ROW_PARALLEL = ("o.bias", "down.bias")
_REPLICATED = (
    "norm.weight", "norm.bias", "router.weight", "router.bias", "expert_bias", "q_down.weight", "kv_down.weight",
    "k_rope.weight",
)  # fmt: skip


class Layout(Protocol):
    """Sizes of the parallel dimensions, in Megatron's words (`nemo_minitron.job.Layout` is one)."""

    @property
    def tp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def vp(self) -> int: ...
    @property
    def cp(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def dp(self) -> int: ...
    @property
    def sp(self) -> bool: ...
    @property
    def expert_tp(self) -> int: ...
    @property
    def first_stage(self) -> int: ...
    @property
    def last_stage(self) -> int: ...


def training_memory(
    student: Architecture,
    layout: Layout,
    *,
    batch: int,
    context: int,
    precision: str = "bf16",
    teacher: Architecture | None = None,
    teacher_precision: str = "",
    distributed_optimizer: bool = True,
    recompute: str = "none",
    micro_batches: int | None = None,
) -> dict[str, int]:
    """Bytes by purpose, on a rank of the pipeline stage that needs most, for `batch` sequences of `context` tokens.

    It counts Megatron's mixed precision: weights in `precision`, gradients summed in fp32, Adam's two moments in fp32
    and, beside bf16 weights, an fp32 master copy. The distributed optimizer spreads moments and master copy over the
    data- and context-parallel ranks. Under FP8 weights are bf16, and the layers' matrices have two FP8 copies, one of
    them transposed for the backward pass. Activations are counted in bf16, which is at most too much. The teacher has
    only frozen weights, in the same layout and in `teacher_precision` (if it is empty, in `precision`). `recompute` as
    in Megatron (see `activations`). `micro_batches`: those of a step (None: enough to fill the pipeline). Not counted:
    communication buffers, one operation's temporary tensors and the allocator's slack.

    Raises InputError for an unknown precision or recomputation.
    """
    wide, frozen_in = weights_in(precision), teacher_precision or precision
    size, state = BYTES[wide], {"fp32": 8, "bf16": 12}[wide]
    copies = _fp8_copies(student, layout, precision, 2)
    frozen_copies = _fp8_copies(teacher, layout, frozen_in, 1) if teacher else [0] * layout.pp
    kept_values = activations(
        student, layout, batch=batch, context=context, precision=wide, recompute=recompute,
        micro_batches=micro_batches, logits=2 if teacher is None else 3,
    )  # fmt: skip
    frozen = parameters_by_stage(teacher, layout) if teacher else [(0, 0)] * layout.pp
    spread, expert_spread = _replicas(layout) if distributed_optimizer else (1, 1)
    stages = [
        {
            "weights": (dense + expert) * size + copied,
            "gradients": (dense + expert) * BYTES["fp32"],
            "optimizer": math.ceil(dense * state / spread) + math.ceil(expert * state / expert_spread),
            "teacher": sum(teachers) * BYTES[weights_in(frozen_in)] + frozen_copied,
            "activations": activation,
        }
        for (dense, expert), copied, teachers, frozen_copied, activation in zip(
            parameters_by_stage(student, layout), copies, frozen, frozen_copies, kept_values, strict=True
        )
    ]
    return max(stages, key=lambda stage: sum(stage.values()))


def forward_memory(
    architecture: Architecture, layout: Layout, *, batch: int, context: int, precision: str = "bf16"
) -> dict[str, int]:
    """Bytes by purpose of forward passes without a backward pass, on a rank of the pipeline stage that needs most.

    A rank holds its weights and the activations of one layer at a time (see `activations`); on the last stage, where
    that is more, the residual stream and the logits, of which the loss makes an fp32 copy if they are bf16. Counted and
    left out is the same as in `training_memory`. Raises InputError for an unknown precision.
    """
    wide = weights_in(precision)
    size, widths = BYTES[wide], {"fp32": BYTES["fp32"], "bf16": BYTES["bf16"] + BYTES["fp32"]}
    logits = size * _residual(architecture, layout) + widths[wide] * math.ceil(architecture.vocab_size / layout.tp)
    tokens, stages = batch * math.ceil(context / layout.cp), []
    copies = _fp8_copies(architecture, layout, precision, 1)
    counts = zip(stage_layers(architecture.num_layers, layout), parameters_by_stage(architecture, layout), strict=True)
    for stage, (layers, parameters) in enumerate(counts):
        held = size * max((_layer(architecture, layer, layout, "none", context) for layer in layers), default=0)
        held = max(held, logits) if stage == layout.pp - 1 else held
        stages.append({"weights": sum(parameters) * size + copies[stage], "activations": round(held * tokens)})
    return max(stages, key=lambda stage: sum(stage.values()))


def gram_bytes(a: Architecture, layout: Layout) -> int:
    """Bytes of the Gram matrices (fp64) of the largest layer on a rank of the layout, with all experts of that rank."""
    dense = AXES["ffn"].length(a) ** 2 // layout.tp
    experts = AXES["experts"].length(a) // layout.ep * (a.moe_ffn_hidden_size or 0) ** 2 // layout.expert_tp
    return 8 * (max(dense, experts) + (a.num_attention_heads * a.value_dim) ** 2 // layout.tp)


def _fp8_copies(architecture: Architecture, layout: Layout, precision: str, copies: int) -> list[int]:
    """Bytes of the FP8 copies of the layers' matrices on one rank, for each pipeline stage."""
    counts = [0] * layout.pp
    stage_of = {layer: s for s, layers in enumerate(stage_layers(architecture.num_layers, layout)) for layer in layers}
    for name, shape in architecture.shapes().items() if precision in FP8 else ():
        if name.startswith("layers.") and len(shape) == 2 and not name.endswith("router.weight"):
            counts[stage_of[int(name.split(".")[1])]] += copies * _on_rank(name, shape, architecture, layout)
    return counts


def _replicas(layout: Layout) -> tuple[int, int]:
    """(Ranks that hold copies of the weights that every token uses, ranks that hold copies of an expert.)"""
    ranks = layout.tp * layout.cp * layout.dp
    return layout.cp * layout.dp, ranks // (layout.ep * layout.expert_tp)


def parameters_by_stage(
    architecture: Architecture, layout: Layout, names: Container[str] | None = None
) -> list[tuple[int, int]]:
    """(Weights that every token uses, weights of experts) on one rank, for each pipeline stage. `names`: the tensors
    that count; None: all.

    The vocabulary is padded to a multiple of TP. If embeddings are tied and there are several stages, the last one
    holds a second copy of them.
    """
    counts = [[0, 0] for _ in range(layout.pp)]
    stage_of = {layer: s for s, layers in enumerate(stage_layers(architecture.num_layers, layout)) for layer in layers}
    for name, shape in architecture.shapes().items():
        if names is not None and name not in names:
            continue
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        stage = stage_of[layer] if layer is not None else 0 if name == "embedding.weight" else layout.pp - 1
        counts[stage][".experts." in name] += _on_rank(name, shape, architecture, layout)
    if names is None and architecture.tied_embeddings and layout.pp > 1:
        shape = (architecture.vocab_size, architecture.hidden_size)
        counts[-1][0] += _on_rank("head.weight", shape, architecture, layout)
    return [(dense, expert) for dense, expert in counts]


def stage_layers(layers: int, layout: Layout) -> list[list[int]]:
    """Layers of each pipeline stage. Virtual stages go to the stages in turn, as in Megatron."""
    if layout.first_stage or layout.last_stage:
        ends = [n for n in (layout.first_stage, layout.last_stage) if n]
        middle = (layers - sum(ends)) // max(1, layout.pp - len(ends))
        sizes = [middle] * layout.pp
        sizes[0], sizes[-1] = layout.first_stage or sizes[0], layout.last_stage or sizes[-1]
    else:
        sizes = [layers // layout.pp] * layout.pp
    dealt, first = [[] for _ in sizes], 0  # type: list[list[int]], int
    for _ in range(layout.vp):
        for stage, size in enumerate(sizes):
            dealt[stage] += range(first, first + size // layout.vp)
            first += size // layout.vp
    return dealt


def _on_rank(name: str, shape: tuple[int, ...], architecture: Architecture, layout: Layout) -> int:
    """Elements of one canonical tensor on a rank that has some of it."""
    if ".experts." in name:
        share = architecture.num_moe_experts or 1
        return math.prod(shape) // layout.expert_tp if int(name.split(".")[3]) < share // layout.ep else 0
    if name.endswith(_ROW_PARALLEL) or (name.endswith(_REPLICATED) and not name.endswith("gated_norm.weight")):
        return math.prod(shape)
    if name in ("embedding.weight", "head.weight"):
        return math.ceil(shape[0] / layout.tp) * shape[1]
    return math.prod(shape) // layout.tp


def activations(
    architecture: Architecture,
    layout: Layout,
    *,
    batch: int,
    context: int,
    precision: str = "bf16",
    recompute: str = "none",
    micro_batches: int | None = None,
    logits: int = 2,
) -> list[int]:
    """Bytes of the forward passes that the backward pass needs, on one rank of each pipeline stage.

    For each token and layer they are: the residual stream and the outputs of both norms (sharded under sequence
    parallelism), q, k, v, the attention's output, and the MLP's branches and their product (in a mixture those of each
    chosen expert, with the token's copy and its output). Attention is fused, so there are no scores.
    `recompute="selective"` keeps no norm's output and no product of branches. `"full"` keeps each layer's input, and
    the activations of one layer at a time. Transformer Engine's fused layers keep this much. The reference layers
    consist of single operations and keep up to twice as much. Norms behind attention and MLP keep their inputs.
    Capped attention is not fused: it keeps four values of 16 bits a score, unless it is recomputed. `logits`: how
    many tensors of the vocabulary's width the last stage holds at once: the logits and their gradient, in
    distillation also the teacher's.

    A stage holds as many micro-batches as Megatron's 1F1B schedule, or its interleaved form with virtual stages, has
    started and not finished. Raises InputError for an unknown recomputation.
    """
    if recompute not in RECOMPUTE:
        raise InputError(f"recompute '{recompute}' is unknown; {nearest(recompute, RECOMPUTE)}")
    full = [_layer(architecture, layer, layout, recompute, context) for layer in range(architecture.num_layers)]
    kept = [_residual(architecture, layout)] * len(full) if recompute == "full" else full
    tokens = batch * math.ceil(context / layout.cp)
    bytes_by_stage = []
    for stage, layers in enumerate(stage_layers(architecture.num_layers, layout)):
        chunks = _chunks_under_way(stage, layout, micro_batches)
        values = sum(kept[layer] for layer in layers) * chunks / layout.vp
        if recompute == "full":
            values += max((full[layer] for layer in layers), default=0)
        if stage == layout.pp - 1:
            values += logits * math.ceil(architecture.vocab_size / layout.tp)
        bytes_by_stage.append(round(values * tokens * BYTES[precision]))
    return bytes_by_stage


def _chunks_under_way(stage: int, layout: Layout, micro_batches: int | None) -> int:
    """The most forward passes of model chunks that wait for their backward pass, in Megatron's schedules."""
    if layout.vp > 1:
        most = (layout.pp - stage - 1) * 2 + (layout.vp - 1) * layout.pp + 1
    else:
        most = layout.pp - stage
    return most if micro_batches is None else min(most, micro_batches * layout.vp)


def _residual(architecture: Architecture, layout: Layout) -> float:
    return architecture.hidden_size / (layout.tp if layout.sp else 1)


def _layer(a: Architecture, layer: int, layout: Layout, recompute: str, context: int) -> float:
    """The number of values that one layer keeps for a token on a rank."""
    selective = recompute == "selective"
    if a.hybrid_pattern:
        return _hybrid_layer(a, layer, layout, selective)
    divided, whole = latents.kept(a)
    attention = divided / layout.tp + whole / (layout.tp if layout.sp else 1)
    if a.capped_attention and not selective:
        attention += 4 * context * a.num_attention_heads / layout.tp
    streams = (2 if selective else 4) + 2 * a.post_norms
    return streams * _residual(a, layout) + attention + sum(_mlp(a, layer, layout, selective))


def _hybrid_layer(a: Architecture, layer: int, layout: Layout, selective: bool) -> float:
    """The residual stream and one norm's output, and what is inside the layer: the scan keeps the projected channels,
    those behind the convolution, and its output before and behind the gated norm."""
    around = (1 if selective else 2) * _residual(a, layout)
    if layer in a.dense_layers:
        return around + sum(_mlp(a, layer, layout, selective))
    if layer in a.attention_layers:
        return around + latents.kept(a)[0] / layout.tp
    inner, states, heads = hybrid.inner(a), hybrid.states(a), a.mamba_num_heads or 0
    return around + (2 * inner + 2 * states + heads + inner + 2 * states + 2 * inner) / layout.tp


def _mlp(a: Architecture, layer: int, layout: Layout, selective: bool) -> Iterator[float]:
    branches = (2 if a.gated_mlp else 1) + (not selective)
    if layer not in a.moe_layers:
        yield branches * a.ffn_hidden_size / layout.tp
        return
    yield a.moe_router_topk * branches * (a.moe_ffn_hidden_size or 0) / layout.expert_tp
    yield a.moe_router_topk * 2 * a.hidden_size
    yield branches * (a.moe_shared_expert_intermediate_size or 0) / layout.tp
    if a.moe_shared_expert_gate:  # the shared expert's output, which its gate is multiplied with
        yield _residual(a, layout)
