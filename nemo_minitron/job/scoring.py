"""What scoring the teacher and re-fitting its matrices takes, for the dry run: memory of a rank, passes and FLOPs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.artifacts.statistics import aggregation_of, criterion
from nemo_minitron.costs import forward_memory, gram_bytes, parameters_by_stage
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.compute import BACKWARD, MFU, PEAK, hours
from nemo_minitron.job.stages.compensate import solves
from nemo_minitron.pruning.reconstruction import cut_blocks, fitted_by, within
from nemo_minitron.settings.calibration import DERIVED, TAYLOR, Calibration
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.recipe import Job


@dataclasses.dataclass(frozen=True)
class Refit:
    """The least squares after a cut. `passes`: how often the rows go through the model. `products`: FLOPs a token of
    the Gram matrices, in all passes together. `memory`: bytes of the Gram matrices of a pass, on a rank. `fits`,
    `fitting`, `student`: passes, FLOPs a token and bytes of the sub-blocks' fit as a whole (`reconstruction_of`)."""

    passes: int = 0
    products: int = 0
    memory: int = 0
    fits: int = 0
    fitting: int = 0
    student: int = 0


def refit_of(source: Architecture, target: Architecture, layout: Layout, memory: float, copies: int = 1) -> Refit:
    """The re-fit of the student `target`. `memory`: GB of Gram matrices on a rank (`Cutting.memory`). `copies`: of each
    Gram matrix (`Cutting.gram_copies`).

    The input of each layer's `down`, `o` or experts that loses units has a Gram matrix, if the layer stays.
    """
    widths = {"ffn": (len(target.dense_layers), source.ffn_hidden_size, target.ffn_hidden_size)}
    sizes = [model.num_attention_heads * model.value_dim for model in (source, target)]
    widths["heads"] = (len(target.attention_layers), sizes[0], sizes[1])
    chosen = len(target.moe_layers) * (source.moe_router_topk or 0)
    widths["experts"] = (chosen, source.moe_ffn_hidden_size or 0, target.moe_ffn_hidden_size or 0)
    cut = [(count, before) for count, before, after in widths.values() if count and after < before]
    if not cut:
        return Refit()
    one, layers = copies * gram_bytes(source, layout), target.num_layers
    at_once = min(layers, max(1, int(memory * 1e9) // one))
    products = sum(2 * count * width**2 for count, width in cut)
    return Refit(math.ceil(layers / at_once), products, min(at_once, math.ceil(layers / layout.pp)) * one)


def reconstruction_of(source: Architecture, target: Architecture, layout: Layout, passes: int) -> tuple[int, int]:
    """(Bytes on a rank, FLOPs a token in all `passes`) of the fit of sub-blocks as a whole.

    A rank holds an fp32 copy of the model that is cut within its sub-blocks, and of the fitted matrices gradients,
    Adam's two moments and what they started from. Each pass is one of the teacher, and a forward and backward pass of
    the sub-blocks; the products of queries and keys are not counted.
    """
    blocks = cut_blocks(source, target) if passes else []
    if not blocks:
        return 0, 0
    student = within(source, target)
    fitted = {name: math.prod(shape) for name, shape in student.shapes().items() if fitted_by(blocks, name)}
    routed = sum(size for name, size in fitted.items() if ".experts." in name)
    active = sum(fitted.values()) - routed
    active += routed * (student.moe_router_topk or 0) // (student.num_moe_experts or 1)
    held = max(map(sum, parameters_by_stage(student, layout)))
    on_rank = max(map(sum, parameters_by_stage(student, layout, fitted)))
    return 4 * (held + 4 * on_rank), passes * 2 * (1 + BACKWARD) * active


def statistics_bytes(source: Architecture, calibration: Calibration) -> int:
    """Bytes of the states behind the scores, at most: fp64, of both halves of the samples, as if one rank had all."""
    shapes = {name: math.prod(shape) for name, shape in expected_shapes(source).items() if name not in DERIVED}
    shapes["ffn_pre_activation"] = shapes["ffn"]
    shapes["head_channels"] = source.num_layers * source.num_attention_heads * source.value_dim
    units = sum(shapes.get(name, 0) for name in calibration.statistics or shapes)
    fields = sum(len(aggregation_of(criterion(name)).fields) for name in calibration.criteria)
    return 8 * 2 * fields * units


def scoring_memory(source: Architecture, calibration: Calibration, layout: Layout) -> dict[str, int]:
    """Purpose -> bytes of the calibration's forward passes, on the rank that needs most (`costs.forward_memory`)."""
    passing = forward_memory(
        source, layout, batch=calibration.batch_size, context=calibration.sequence_length,
        precision=calibration.precision,
    )  # fmt: skip
    return passing | {"statistics": statistics_bytes(source, calibration)}


def scoring_flops(source: Architecture, calibration: Calibration, refit: Refit) -> dict[str, int]:
    """Purpose -> FLOPs of all rows: the calibration's pass, with a backward pass for Taylor scores, and the re-fit's
    passes with their Gram matrices. Attention counts at the mean position."""
    tokens = calibration.samples * calibration.sequence_length
    forward = source.flops_per_token(calibration.sequence_length // 2)
    scored = calibration.runs * (1 + BACKWARD * (calibration.method == TAYLOR))
    return {
        "scores": tokens * forward * scored,
        "re-fit": tokens * (refit.passes * forward + refit.products),
        "reconstruction": tokens * (refit.fits * forward + refit.fitting),
    }


def rotation_flops(job: Job, source: Architecture) -> dict[str, int]:
    """The pass that sums up the stream, with a product for each norm; not counted: the rotation of the weights, on the
    CPU. Two norms a layer, of a hybrid one, and the final one."""
    if not job.cutting.rotate:
        return {}
    calibration, length = calibration_of(job, source), job.calibration.sequence_length
    norms = source.num_layers * (1 if source.hybrid_pattern else 2) + 1
    each = source.flops_per_token(length // 2) + 2 * norms * source.hidden_size**2
    return {"rotation": calibration.samples * length * each}


def gap_flops(job: Job, source: Architecture, target: Architecture) -> dict[str, int]:
    """The pass that sums up both ends of dropped layers; not counted: the products, for a few matrices."""
    if not job.cutting.fill_gaps or source.num_layers == target.num_layers:
        return {}
    calibration, length = calibration_of(job, source), job.calibration.sequence_length
    return {"gaps": calibration.samples * length * source.flops_per_token(length // 2)}


def seconds_of(flops: dict[str, int]) -> float:
    """On one GPU, at the speed at which the dry run counts training."""
    return sum(flops.values()) / (PEAK * MFU)


def describe_scoring(job: Job, source: Architecture, target: Architecture) -> list[str]:
    """The dry run's lines. A Taylor score's backward pass keeps more than is counted, so it has no lines of memory."""
    calibration = calibration_of(job, source)
    cutting = job.cutting
    refit = refit_of(source, target, job.layout, cutting.memory, cutting.gram_copies) if solves(job) else Refit()
    if solves(job) and job.cutting.reconstruct:
        student, fitting = reconstruction_of(source, target, job.layout, job.cutting.reconstruct)
        refit = dataclasses.replace(refit, fits=job.cutting.reconstruct, fitting=fitting, student=student)
    flops, lines = scoring_flops(source, calibration, refit) | rotation_flops(job, source), []
    flops |= gap_flops(job, source, target)
    if calibration.runs and calibration.method != TAYLOR:
        memory = scoring_memory(source, calibration, job.layout)
        lines = ["", "memory of scoring, each rank:", *gigabytes({**memory, "sum": sum(memory.values())})]
        lines += gigabytes({"Gram matrices (re-fit)": refit.memory} if refit.passes else {})
        lines += gigabytes({"student (reconstruct)": refit.student} if refit.student else {})
    gpu_hours = hours(seconds_of(flops) / 3600)
    parts = ", ".join(f"{name} {count:.2e}" for name, count in flops.items() if count)
    text = f"scoring: GPU-hours: {gpu_hours}: {sum(flops.values()):.2e} FLOPs ({parts}) at the speed of training"
    text += ", which fp32 does not reach" if calibration.precision == "fp32" else ""
    return [*lines, *[text] * bool(parts), *[_passes(refit)] * (refit.passes > 1)]


def _passes(refit: Refit) -> str:
    return f"the re-fit reads the rows {refit.passes} times; cutting.memory limits the layers of a pass"


def gigabytes(sizes: Mapping[str, int]) -> list[str]:
    return [f"  {name:22}{size / 1e9:>12.3f} GB" for name, size in sizes.items()]
