"""A model and a plan -> the student, a Hugging Face folder, or a checkpoint of the host that runs this."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan, Scores
from nemo_minitron.artifacts.files import need_space
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.commands.corpus import begin
from nemo_minitron.commands.place import check_writable
from nemo_minitron.errors import InputError
from nemo_minitron.families import check_stage, from_hf, resolve
from nemo_minitron.hosts import check_model, host_of
from nemo_minitron.pruning.compensation import fold_norms, head_residual
from nemo_minitron.pruning.cut import check_plan
from nemo_minitron.pruning.gaps import gap_scales
from nemo_minitron.pruning.merging import check_refitted, merge_experts
from nemo_minitron.settings.orders import PruneOrder
from nemo_minitron.sources.open import is_checkpoint
from nemo_minitron.sources.tensors import ModelSource


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a student gets besides slices of its teacher: the re-fitted matrices in a file `compensation`, norms that
    are folded for a cut of hidden, writers that are scaled behind dropped layers, the residual of pruned heads
    ("paper" or "laco"), and dropped experts that are merged into kept ones. For the last three a file of `scores` has
    the stream's length, the order of heads, and how often experts were chosen."""

    compensation: Path | None = None
    fold_norms: bool = False
    head_residual: str | None = None
    scores: Path | None = None
    scale_gaps: bool = False
    merge_experts: bool = False

    @property
    def need_scores(self) -> bool:
        """Whether some of them read the scores."""
        return self.head_residual is not None or self.scale_gaps or self.merge_experts


def run_prune(
    model: str, plan: Path, out: Path, overwrite: bool = False, extras: Extras = Extras()
) -> Architecture:  # fmt: skip
    """`minitron prune`: writes the student to `out`. A Hugging Face folder is cut by moving bytes, a checkpoint in a
    process of its own.

    Gives the student's Architecture. Raises InputError, and RuntimeError if that process fails.
    """
    from nemo_minitron.pruning import prune
    from nemo_minitron.sources.open import open_source

    check_writable(out)
    path, loaded = resolve(model), PrunePlan.load(plan)
    checkpoint = is_checkpoint(path)
    if extras == Extras() and not checkpoint:
        begin(f"cutting {model}")
        return from_hf(prune(path, loaded, out, overwrite=overwrite))
    if checkpoint:
        _check_place(path, loaded, out, overwrite)
    source = open_source(path)
    if checkpoint:
        check_model(source.config, "prune")
        check_plan(loaded, source)
        need_space(out, 4 * loaded.target.parameters())  # bytes: weights of at most fp32
    compensation = compensation_of(source, loaded, extras)
    begin(f"cutting {model}")
    if not checkpoint:
        return from_hf(prune(source, loaded, out, compensation=compensation, overwrite=overwrite))
    from nemo_minitron.launch.torchrun import launch

    with apart() as scratch:
        file = scratch / "compensation.safetensors"
        if compensation is not None:
            compensation.save(file)
        launch(PruneOrder(path, plan, out, file if compensation else None), host_of().worker)
    return loaded.target


def compensation_of(source: ModelSource, plan: PrunePlan, extras: Extras) -> Compensation | None:
    """Everything that `extras` ask for, in one Compensation; None if they ask for nothing. Raises InputError."""
    if extras == Extras():
        return None
    if extras.need_scores != (extras.scores is not None):
        raise InputError(
            "--head-residual, --scale-gaps and --merge-experts need --scores; give it with at least one of them, or "
            "none of the four"
        )
    check_stage(source.config, "prune with extras")
    check_plan(plan, source)
    compensation = Compensation(plan.digest, {})
    if extras.compensation:
        compensation = Compensation.load(extras.compensation)
        compensation.check(plan)
    if extras.fold_norms:
        compensation = compensation.joined(fold_norms(source, plan), {"folded norms": True})
    if extras.head_residual and extras.scores:
        heads = Scores.load(extras.scores)["heads"]
        compensation = compensation.joined(
            head_residual(source, plan, heads, extras.head_residual), {"head residual": extras.head_residual}
        )
    if extras.merge_experts and extras.scores:
        check_refitted(compensation.tensors)
        merged = merge_experts(source, plan, Scores.load(extras.scores))
        compensation = compensation.joined(merged, {"merged experts": merged.described()})
    if extras.scale_gaps and extras.scores:
        if compensation.scales:
            raise InputError("the compensation fills the gaps and scales what is behind them; leave --scale-gaps out")
        scales = gap_scales(plan, Scores.load(extras.scores))
        by_layer: JsonObject = {name.split(".")[1]: scale for name, scale in scales.items()}
        compensation = compensation.joined({}, {"scaled behind dropped layers": by_layer})
        compensation = dataclasses.replace(compensation, scales=scales)
    return compensation


def _check_place(path: Path, plan: PrunePlan, out: Path, overwrite: bool) -> None:
    """Raises InputError for a cut of a checkpoint that cannot run, as far as that is known before it is opened."""
    teacher, student = path.resolve(), out.resolve()
    if teacher == student or teacher in student.parents or student in teacher.parents:
        raise InputError(f"the student's folder '{out}' overlaps the teacher's '{path}'")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (overwrite and is_checkpoint(out))):
        raise InputError(f"'{out}' already exists; give a new folder, or --overwrite for a checkpoint")
    if "vocab" in plan.keep:
        raise InputError(
            "a vocabulary can be cut only in a Hugging Face folder; leave 'vocab' out for a checkpoint of NeMo or "
            "Megatron-Bridge"
        )
