"""Run under torchrun (or alone): losses on vocabulary shards against the unsharded float64 reference, on every rank.

`losses_worker.py FOLDER [triton]`: the numbers of each case to FOLDER/RANK.json; with `triton`, only what has kernels,
by them. The cases and the reference are in `losses64.py`.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

from losses64 import CASES, EDGES, FUSED, edge_logits, random, reference, shard


def counted():
    """Counts calls of collectives from now on."""
    import torch

    calls = []
    for name in ("all_gather", "all_to_all_single", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        real = getattr(torch.distributed, name)

        def count(*given, _real=real, _name=name, **more):
            calls.append(_name)
            return _real(*given, **more)

        setattr(torch.distributed, name, count)
    return calls


def run_case(case, calls, rank, world, group):
    from nemo_minitron.distillation import losses
    from nemo_minitron.distillation.losses import _per_token

    vocab, extra_s, extra_t = case["layout"]
    student, teacher, weights = random(vocab, case["shape"], case["dtype"])
    _per_token.CHUNK["cpu"] = case["chunk"]
    mine, true = shard(student.movedim(-1, 0), extra_s, rank, world)
    theirs = shard(teacher.movedim(-1, 0), extra_t, rank, world)[0].movedim(0, -1)
    local = mine.movedim(0, -1).contiguous().requires_grad_()
    k = [case["k"]] if case["k"] else []
    calls.clear()
    vocab_size = None if extra_s is None else vocab
    # A leaf may not be overwritten: in place on a product of it, as the head's output is one.
    logits, in_place = (local * 1, True) if case["chunk"] == 600 else (local, False)
    before = local.detach().clone(), theirs.clone()
    loss = getattr(losses, case["loss"])(logits, theirs, *k, case["temperature"], group, vocab_size, in_place)
    (loss * weights).sum().backward()
    exact = student.double().requires_grad_()
    value = reference(case["loss"], exact, teacher.double(), case["temperature"], case["k"])
    (value * weights.double()).sum().backward()
    expected, _ = shard(exact.grad.movedim(-1, 0), extra_s, rank, world)
    wrong = (local.grad.double() - expected.movedim(0, -1))[..., :true].abs()
    return {
        "value": ((loss.double() - value).abs() / (1 + value)).max().item(),
        "gradient": wrong.max().item() if wrong.numel() else 0.0,
        "largest": exact.grad.abs().max().item(),
        "padding": local.grad[..., true:].abs().sum().item(),
        "read alone": all(x.allclose(y, 0, 0, equal_nan=True) for x, y in zip((local, theirs), before, strict=True)),
        "collectives": len(calls),
        "dtypes": [str(loss.dtype), str(local.grad.dtype)],
    }


def run_edge(case, rank, world, group):
    """How far value and gradient are from float64's: the value's error as a part of it, infinities as booleans."""
    import torch

    from nemo_minitron.distillation import losses
    from nemo_minitron.distillation.losses import _per_token

    vocab = 509
    _per_token.CHUNK["cpu"] = 1200  # two rows at TP 1
    student, teacher = edge_logits(case["edge"], vocab)
    mine, true = shard(student.movedim(-1, 0), 0, rank, world)
    theirs, _ = shard(teacher.movedim(-1, 0), 1, rank, world)
    local = mine.movedim(0, -1).contiguous().requires_grad_()
    k = [case["k"]] if case["k"] else []
    loss = getattr(losses, case["loss"])(local, theirs.movedim(0, -1), *k, case["temperature"], group, vocab)
    loss.sum().backward()
    exact = student.double().requires_grad_()
    value = reference(case["loss"], exact, teacher.double(), case["temperature"], case["k"])
    value.sum().backward()
    expected, _ = shard(exact.grad.movedim(-1, 0), 0, rank, world)
    wrong = (local.grad.double() - expected.movedim(0, -1))[..., :true].abs()
    relative = ((loss.double() - value).abs() / value)[torch.isfinite(value)]
    return {
        "infinite": [torch.isinf(value).tolist(), torch.isinf(loss).tolist(), torch.isnan(loss).any().item()],
        "value": relative.max().item() if len(relative) else 0.0,
        "gradient": wrong.max().item() if wrong.numel() else 0.0,
        "largest": exact.grad.abs().max().item(),
    }


def run_fused(case, calls, rank, world, group):
    """Hidden 24 and 40, 4 x 3 tokens; the reference's hidden states, heads and logits are float64 and whole."""
    import torch

    from nemo_minitron.distillation import fused_head
    from nemo_minitron.distillation.losses import _per_token

    vocab, extra_s, extra_t = case["layout"]
    fused_head.CHUNK["cpu"], _per_token.CHUNK["cpu"] = 3, 1 << 20
    dtype, s, b = getattr(torch, case["dtype"]), 4 * world, 3
    generator = torch.Generator().manual_seed(vocab)
    hidden, weight, t_hidden, t_weight = (
        torch.randn(*shape, generator=generator).mul(scale).to(dtype)
        for shape, scale in (((s, b, 24), 1), ((vocab, 24), 0.6), ((s, b, 40), 1), ((vocab, 40), 0.5))
    )
    mask = torch.randint(0, 3, (s, b), generator=generator).float() if case["mask"] else None
    mine = hidden.chunk(world)[rank] if case["sp"] else hidden
    mine, theirs = mine.clone().requires_grad_(), t_hidden.chunk(world)[rank] if case["sp"] else t_hidden
    (head, true), (t_head, _) = shard(weight, extra_s, rank, world), shard(t_weight, extra_t, rank, world)
    head = head.requires_grad_()
    teacher = {"teacher_logits": t_hidden @ t_head.t()} if case["given"] else {}
    if not case["given"]:
        teacher = {"teacher_hidden": theirs, "teacher_weight": t_head}
    settings = {
        **teacher, "temperature": case["temperature"], "loss_mask": mask, "vocab_size": vocab, "group": group,
        "sequence_parallel": case["sp"],
    }  # fmt: skip
    calls.clear()
    loss = fused_head.fused_forward_kl(mine, head, **settings)
    forward = len(calls)
    (loss * (2.5 if mask is None else 2.5 * mask)).sum().backward()
    backward = len(calls) - forward
    main_grad = twice_into_main_grad(mine, head, settings)
    exact_h, exact_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact_t = t_hidden.double() @ t_weight.double().t()
    value = reference("forward_kl", exact_h @ exact_w.t(), exact_t, case["temperature"])
    if mask is not None:
        value = value * (mask != 0)
    (value * (2.5 if mask is None else 2.5 * mask)).sum().backward()
    expected_h = exact_h.grad.chunk(world)[rank] if case["sp"] else exact_h.grad
    expected_w, _ = shard(exact_w.grad, extra_s, rank, world)
    wrong_w = (head.grad.double() - expected_w)[:true].abs()
    wrong_main = (main_grad.double() / 2 - expected_w)[:true].abs()
    return {
        "value": ((loss.double() - value).abs() / (1 + value)).max().item(),
        "hidden": ((mine.grad.double() - expected_h).abs().max() / exact_h.grad.abs().max()).item(),
        "weight": (wrong_w.max() / exact_w.grad.abs().max()).item() if wrong_w.numel() else 0.0,
        "main_grad": (wrong_main.max() / exact_w.grad.abs().max()).item() if wrong_main.numel() else 0.0,
        "padding": head.grad[true:].abs().sum().item() + main_grad[true:].abs().sum().item(),
        "tokens": s * b if mask is None else int((mask != 0).sum()),
        "collectives": [forward, backward],
    }


def twice_into_main_grad(hidden, weight, settings):
    """[V/tp, H] fp32: what two micro-batches add to main_grad. Autograd's gradient is unset, for Megatron to drop."""
    import torch

    from nemo_minitron.distillation.fused_head import fused_forward_kl

    hidden, weight = (leaf.detach().requires_grad_() for leaf in (hidden, weight))
    weight.main_grad = torch.zeros(weight.shape)
    mask = settings["loss_mask"]
    for _ in range(2):
        loss = fused_forward_kl(hidden, weight, **settings, main_grad_scale=2.5)
        (loss * (2.5 if mask is None else 2.5 * mask)).sum().backward()
    return weight.main_grad


def twice_in_place():
    """What is said to a second backward pass after the gradient was written over the logits."""
    import torch

    from nemo_minitron.distillation.losses import forward_kl

    head, teacher = torch.randn(3, 17, requires_grad=True), torch.randn(3, 17)
    loss = forward_kl(head * 1, teacher, in_place=True).sum()
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def both_losses(group, dtype):
    """KL and LM loss of the same padded logits, as the step has them: how far the gradient is from float64's, whole."""
    import torch

    from nemo_minitron.backend import differences

    differences.load()
    from megatron.core import parallel_state

    from nemo_minitron.distillation.step import Objective

    rank, world = (0, 1) if group is None else (torch.distributed.get_rank(), torch.distributed.get_world_size())
    if not parallel_state.is_initialized():
        if group is None:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    student, teacher, _ = random(101, (2, 3), dtype)
    mine, true = shard(student.movedim(-1, 0), 11, rank, world)
    theirs = shard(teacher.movedim(-1, 0), 11, rank, world)[0].movedim(0, -1)
    local = mine.nan_to_num(5.0).movedim(0, -1).contiguous().requires_grad_()
    labels = torch.arange(6).view(2, 3) * 17
    parts = Objective(101, lm_weight=1.0).of_logits(local * 1, {"labels": labels}, theirs)
    (parts["logits"] + parts["lm"]).sum().backward()
    exact = student.double().requires_grad_()
    value = reference("forward_kl", exact, teacher.double(), 1.0).sum()
    (value + torch.nn.functional.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="sum")).backward()
    wanted, _ = shard(exact.grad.movedim(-1, 0), 11, rank, world)
    wrong = (local.grad.double() - wanted.movedim(0, -1))[..., :true].abs()
    return wrong.max().item() if wrong.numel() else 0.0


def main():
    import torch

    torch.set_num_threads(1)
    rank, world, group = 0, 1, None
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        group = torch.distributed.group.WORLD
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cases, launches = CASES, []
    if "triton" in sys.argv:
        from nemo_minitron.distillation.losses import _triton

        _triton.usable = lambda logits: launches.append(1) or True
        # Blocks of 256 columns, so that a row has several.
        from nemo_minitron.distillation.losses import _triton_kernels

        _triton_kernels.launch = lambda *_: {"BLOCK": 256, "num_warps": 1}
        cases = [case for case in CASES if case["loss"] == "forward_kl"]
    calls = counted()
    results = {
        "losses": [{**case, **run_case(case, calls, rank, world, group)} for case in cases],
        "fused": [{**case, **run_fused(case, calls, rank, world, group)} for case in FUSED],
    }
    results["edges"] = [
        {**case, **run_edge(case, rank, world, group)}
        for case in EDGES
        if "triton" not in sys.argv or case["loss"] == "forward_kl"
    ]
    results |= {"launches": len(launches), "twice": twice_in_place()}
    if "triton" in sys.argv:
        results["both"] = {dtype: both_losses(group, dtype) for dtype in ("float32", "bfloat16")}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(results))
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
