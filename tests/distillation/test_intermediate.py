"""Losses between intermediate states: values and gradients of transformers in float64, on bare Megatron modules.

Mutations tried by hand, each of which makes `test_values_and_gradients` fail: the attached loss's gradient left out,
the MLP's output not scaled, the mask ignored.
"""

import sys
from pathlib import Path

import pytest
import torch
from pico import pico_llama
from ranks import leave_layout
from tolerances import STATE_GRADIENT_FP32, STATE_LOSS_FP32

sys.path.insert(0, str(Path(__file__).parents[1] / "importance"))

pytestmark = pytest.mark.nemo

PAIRS = "embedding,attention:1:2,mlp:2:3,block:0:1,block:2:5"
WEIGHT = 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "teacher")
    pico_llama(folder / "student", seed=1, num_hidden_layers=3, hidden_size=40)
    return folder


@pytest.fixture(scope="module")
def batch():
    tokens = torch.randint(0, 509, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(12) < torch.tensor([[12], [5]])).float()
    return {"tokens": tokens, "position_ids": torch.arange(12).expand(2, 12), "loss_mask": mask}


@pytest.fixture(scope="module")
def models(folder):
    """(Teacher, student's chunks), bare Megatron modules of one process."""
    from depth_worker import build

    import nemo_minitron.backend as backend
    from nemo_minitron.distillation.teacher import Teacher
    from nemo_minitron.megatron.groups import start
    from nemo_minitron.megatron.live import fill
    from nemo_minitron.sources.folder import HFSource

    backend.setup()
    start()
    made = []
    for name in ("teacher", "student"):
        source = HFSource(folder / name)
        leave_layout()
        made.append(build(source.architecture))
        fill(made[-1], source)
    yield Teacher(made[0], inputs), made[1]
    leave_layout()


def inputs(batch):
    return {"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "attention_mask": None}


def ours(models, batch, measure, weight=WEIGHT):
    """(means of the parts, the student's gradients by name, the projection), of one step."""
    from nemo_minitron.distillation.intermediate import Intermediate
    from nemo_minitron.distillation.layer_map import layer_map
    from nemo_minitron.distillation.meter import Meter
    from nemo_minitron.distillation.projection import Projection

    teacher, student = models
    pairs = layer_map(PAIRS, 3, 6)
    meter, projection = Meter(list(map(str, pairs))), Projection(40, 48, seed=5)
    losses = Intermediate(pairs, student, teacher, measure=measure, weight=weight, projection=projection, meter=meter)
    try:
        student[0].zero_grad()
        losses.expect(batch)
        teacher.hidden(batch)
        student[0](**inputs(batch)).mean().backward()
        meter.add("tokens", batch["loss_mask"].sum())
        return meter.reduce(), {name: p.grad for name, p in student[0].named_parameters()}, projection
    finally:
        losses.remove()


def states(model, tokens):
    """(logits, state by pair item): outputs of norms and MLPs of transformers' model."""
    layers, seen, handles = model.model.layers, {}, []
    sites = {("attention", i): layer.post_attention_layernorm for i, layer in enumerate(layers)}
    sites |= {("mlp", i): layer.mlp for i, layer in enumerate(layers)}
    norms = [*(layer.input_layernorm for layer in layers), model.model.norm]
    sites |= {("block", i): norm for i, norm in enumerate(norms[1:])} | {("embedding", -1): norms[0]}
    for point, module in sites.items():
        hook = lambda _, __, output, point=point: seen.__setitem__(point, output)  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    logits = model(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    for i in range(len(layers)):
        seen["mlp", i] = torch.nn.functional.rms_norm(seen["mlp", i], seen["mlp", i].shape[-1:], eps=3e-5)
    return logits, seen


@pytest.fixture(scope="module")
def expected(folder, batch):
    """measure -> (means of the parts, gradients of transformers' student by name, of the projection), in float64."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.distillation.layer_map import layer_map

    def of(measure, start):
        teacher, student = (
            AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float64) for n in ("teacher", "student")
        )
        weight = start.detach().double().requires_grad_()
        _, target = states(teacher, batch["tokens"])
        logits, found = states(student, batch["tokens"])
        mask, parts, total = batch["loss_mask"].double(), {}, 0.0
        for pair in layer_map(PAIRS, 3, 6):
            a, b = found[pair.kind, pair.student] @ weight.t(), target[pair.kind, pair.teacher].detach()
            if measure == "cosine":
                each = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)
            else:
                each = (a - b).square().mean(-1)
            parts[str(pair)] = ((each * mask).sum() / mask.sum()).item()
            total = total + (each * mask).sum()
        (logits.mean() + WEIGHT * total).backward()
        return parts, {name: p.grad for name, p in student.named_parameters()}, weight.grad

    return of


NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
for i in range(3):
    NAMES |= {
        f"decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight": f"model.layers.{i}.input_layernorm.weight",
        f"decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight": f"model.layers.{i}.post_attention_layernorm.weight",
        f"decoder.layers.{i}.mlp.linear_fc2.weight": f"model.layers.{i}.mlp.down_proj.weight",
        f"decoder.layers.{i}.self_attention.linear_proj.weight": f"model.layers.{i}.self_attn.o_proj.weight",
    }


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_values_and_gradients(measure, models, batch, expected):
    parts, gradients, projection = ours(models, batch, measure)
    wanted, theirs, of_projection = expected(measure, projection.weight)
    assert parts.pop("tokens") == batch["loss_mask"].sum()
    assert parts == pytest.approx(wanted, rel=STATE_LOSS_FP32)
    for name, other in NAMES.items():
        wrong = (gradients[name][: len(theirs[other])].double() - theirs[other]).abs().max()
        assert wrong < STATE_GRADIENT_FP32 * theirs[other].abs().max(), name
    wrong = (projection.weight.grad.double() / WEIGHT - of_projection / WEIGHT).abs().max()
    assert wrong < STATE_GRADIENT_FP32 * of_projection.abs().max() / WEIGHT


def test_hooks_that_are_removed_leave_the_gradients_of_the_logits(models, batch):
    _, student = models
    ours(models, batch, "cosine")
    student[0].zero_grad()
    student[0](**inputs(batch)).mean().backward()
    alone = {name: p.grad.clone() for name, p in student[0].named_parameters()}
    _, none, _ = ours(models, batch, "cosine", weight=0.0)
    for name, gradient in alone.items():
        assert (none[name] - gradient).abs().max() <= STATE_GRADIENT_FP32 * gradient.abs().max(), name


def test_the_teacher_is_frozen_and_ends_at_its_last_hidden_state(models, batch):
    teacher, student = models
    assert not any(p.requires_grad for chunk in teacher.chunks for p in chunk.parameters())
    assert not any(module.training for chunk in teacher.chunks for module in chunk.modules())
    hidden = teacher.hidden(batch)
    assert hidden.shape == (12, 2, 48)
    assert not hidden.requires_grad
    whole = teacher.logits(hidden)
    teacher.chunks[0].post_process = True
    try:
        assert torch.equal(teacher.chunks[0](**inputs(batch)), whole)
    finally:
        teacher.chunks[0].post_process = False
    assert student[0].training


def test_projection_steps_as_adam_and_is_restored(models):
    from nemo_minitron.distillation.projection import Projection

    straight, halted = Projection(4, 6, seed=2), Projection(4, 6, seed=2)
    gradients = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(1))
    for i, gradient in enumerate(gradients):
        for each in (straight, halted):
            each.weight.grad = gradient.clone()
            each.step(0.1 / (i + 1), tokens=3.0, sharded=False)
        if i == 1:
            state, halted = halted.state(), Projection(4, 6, seed=9)
            halted.load(state)
    assert torch.equal(straight.weight, halted.weight)


def test_projection_starts_where_a_plan_put_the_channels(models):
    from nemo_minitron.distillation.projection import Projection

    student = torch.randn(2, 3)
    placed = Projection(3, 5, seed=0, kept=[0, 2, 4])(student)
    assert torch.equal(placed[:, [0, 2, 4]], student)
    assert not placed[:, [1, 3]].any()


def test_a_student_that_recomputes_is_refused(models, batch):
    from nemo_minitron.errors import InputError

    _, student = models
    student[0].config.recompute_granularity = "full"
    try:
        with pytest.raises(InputError, match="recompute_granularity"):
            ours(models, batch, "cosine")
    finally:
        student[0].config.recompute_granularity = None


def test_no_hook_is_left_after_the_fit(models):
    """The callback that Lightning calls when a fit ends takes every hook off the student and the teacher."""
    from lightning.pytorch.callbacks import Callback

    from nemo_minitron.distillation.intermediate import Intermediate
    from nemo_minitron.distillation.layer_map import layer_map
    from nemo_minitron.distillation.meter import Meter
    from nemo_minitron.distillation.projection import Projection
    from nemo_minitron.nemo import Distillation

    teacher, student = models

    def hooks():
        modules = [module for chunk in (*teacher.chunks, *student) for module in chunk.modules()]
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    assert "on_fit_end" in vars(Callback)
    before, pairs, callback = hooks(), layer_map(PAIRS, 3, 6), Distillation("teacher")
    meter, projection = Meter(list(map(str, pairs))), Projection(40, 48, seed=5)
    callback.distiller._intermediate = Intermediate(pairs, student, teacher, projection=projection, meter=meter)
    assert hooks() == before + 2 * len(pairs)
    callback.on_fit_end(None, None)
    assert hooks() == before
