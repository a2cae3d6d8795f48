"""The options of a distillation callback, which are the same on every host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.distillation import losses
from nemo_minitron.distillation.intermediate import MEASURES
from nemo_minitron.distillation.step import Objective
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.families import family_of
from nemo_minitron.megatron.distiller import Distiller
from nemo_minitron.schema import SEEDS
from nemo_minitron.settings.orders import DistillOrder
from nemo_minitron.settings.validated import check_number, check_whole

if TYPE_CHECKING:
    from nemo_minitron.distillation.teacher import Inputs
    from nemo_minitron.megatron.load import Build


def without_teacher(config: HfConfig) -> dict[str, Any]:
    """The options of a distillation callback for a training on text alone, of the model with this Hugging Face config.
    A mixture's routers have the load-balancing loss that the config names.

    Megatron's own loss would count the padding of the vocabulary, which differs between layouts, and would weigh
    micro-batches alike, however many of their tokens count.
    """
    coefficient = family_of(config).routers_loss(config)
    return {"teacher": "", "logits_weight": 0.0, "lm_weight": 1.0, "moe_aux_loss_coeff": coefficient}


def make_distiller(
    build: Build, inputs: Inputs, *, teacher: str, loss: str, temperature: float, precision: str, offload: bool,
    top_k: int, logits_weight: float, lm_weight: float, intermediate: str, intermediate_loss: str,
    intermediate_weight: float | None, plan: str | None, seed: int, cache: str, moe_aux_loss_coeff: float,
    common_vocabulary: int | None,
) -> Distiller:  # fmt: skip
    """The Distiller of a host's callback. `build`: the host's, which builds the teacher; `inputs`: a micro-batch -> the
    arguments of a model's forward pass; the others are the callback's own.

    Raises InputError for an unknown name and for a number out of its range.
    """
    for name, value, legal in (("loss", loss, losses.__all__), ("intermediate_loss", intermediate_loss, MEASURES)):
        if value not in legal:
            raise InputError(f"{name} '{value}' is unknown; {nearest(value, legal)}")
    for name, number in (
        ("temperature", temperature), ("logits_weight", logits_weight), ("lm_weight", lm_weight),
        ("intermediate_weight", intermediate_weight or 0.0), ("moe_aux_loss_coeff", moe_aux_loss_coeff),
    ):  # fmt: skip
        check_number(name, number, above_zero=name == "temperature")
    check_whole("top_k", top_k)
    check_whole("seed", seed, least=0, most=SEEDS)
    if common_vocabulary is not None:
        check_whole("common_vocabulary", common_vocabulary)
    if not (logits_weight or lm_weight):
        raise InputError("logits_weight and lm_weight are both 0; at least one must be above")
    return Distiller(
        teacher, Objective(0, loss, temperature, top_k, logits_weight, lm_weight), build, inputs,
        precision=precision, offload=offload, cache=cache, aux=moe_aux_loss_coeff, pairs=intermediate,
        measure=intermediate_loss, weight=intermediate_weight, plan=PrunePlan.load(plan) if plan else None,
        seed=seed, common=common_vocabulary,
    )  # fmt: skip


def options_of(order: DistillOrder) -> dict[str, Any]:
    """An order's settings as the options of a distillation callback."""
    recipe = order.distillation
    return {
        "teacher": str(order.teacher or ""), "loss": recipe.loss, "temperature": recipe.temperature,
        "precision": recipe.teacher_precision or recipe.precision, "offload": recipe.offload_teacher,
        "top_k": recipe.top_k, "logits_weight": recipe.logits_weight, "lm_weight": recipe.lm_weight,
        "intermediate": recipe.intermediate, "intermediate_loss": recipe.intermediate_loss,
        "intermediate_weight": recipe.intermediate_weight or None, "plan": str(order.plan) if order.plan else None,
        "seed": recipe.seed, "cache": recipe.teacher_cache, "moe_aux_loss_coeff": recipe.moe_aux_loss_coeff,
        "common_vocabulary": order.common_vocabulary,
    }  # fmt: skip
