"""Sub-blocks fitted as a whole by hand, on transformers' modules in float64: what a reconstruction should give."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.pruning import prune
from nemo_minitron.pruning.reconstruction import cut_within

# Name of a sub-block -> (transformers' module, the matrices that Megatron keeps in one weight: {theirs: canonical})
ATTENTION = ("self_attn", [{f"{n}_proj": f"{n}.weight" for n in "qkv"}, {"o_proj": "o.weight"}])
MLP = ("mlp", [{"gate_proj": "gate.weight", "up_proj": "up.weight"}, {"down_proj": "down.weight"}])
LLAMA = {"attention": ATTENTION, "MLP": MLP}


def mixtral(experts):
    """Transformers 4's, of so many experts."""
    groups = []
    for e in range(experts):
        canonical, theirs = f"experts.{e}", f"experts.{e}"
        groups.append({f"{theirs}.w1": f"{canonical}.gate.weight", f"{theirs}.w3": f"{canonical}.up.weight"})
        groups.append({f"{theirs}.w2": f"{canonical}.down.weight"})
    return {"experts": ("block_sparse_moe", groups)}


def fits(teacher, plan, solved, rows, blocks, *, passes, batch, held, work):
    """({student's tensor: fitted}, {`LAYER NAME`: the held-out error as a share of the start's}).

    `solved`: the Compensation of `cut_within(plan)`, from which the fits start. `rows`: int64 [rows, length].
    """
    within = cut_within(plan)
    prune(teacher, within, work / "start", compensation=Compensation.load(solved))
    whole, cut = (opened(folder) for folder in (teacher, work / "start"))
    made, shares = {}, {}
    for number, origin in enumerate(plan.kept_layers):
        for name, (module, groups) in blocks.items():
            seen = passed(whole, origin, module, rows, batch)
            own = cut.model.layers[origin].get_submodule(module)
            fitted, shares[f"{origin} {name}"] = fit(own, groups, seen, passes, held // batch)
            for local, tensor in fitted.items():
                made[f"layers.{number}.{local}"] = of_kept_channels(plan, local, tensor).numpy()
    return made, shares


def opened(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def passed(model, layer, module, rows, batch):
    """For each step's rows: how the sub-block was called, what it wrote, and the weight of each of its tokens."""
    found, block = [], model.model.layers[layer]

    def keep(module, args, kwargs, output):
        found.append([args, kwargs, first(output).clone()])

    def weigh(module, args, output):
        found[-1].append(1 / first(output).square().mean(-1))

    handles = [
        block.get_submodule(module).register_forward_hook(keep, with_kwargs=True), block.register_forward_hook(weigh)
    ]  # fmt: skip
    with torch.no_grad():
        for part in rows.split(batch):
            model(part, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def first(output):
    return output[0] if isinstance(output, tuple) else output


def fit(module, groups, seen, passes, held):
    """({canonical name: matrix}, the held-out error over that of the start); the first `held` of `seen` are held
    out."""
    weights = {theirs: module.get_submodule(theirs).weight for group in groups for theirs in group}
    start = {theirs: weight.clone() for theirs, weight in weights.items()}
    optimizer = torch.optim.Adam(
        [{"params": [weights[theirs].requires_grad_() for theirs in group]} for group in groups],
        betas=(0.9, 0.95), eps=1e-12,
    )  # fmt: skip
    rates = [0.01 * float(torch.cat([weights[n].detach().flatten() for n in group]).square().mean().sqrt())
             for group in groups]  # fmt: skip

    def error(args, kwargs, wrote, weight):
        return ((first(module(*args, **kwargs)) - wrote).square().mean(-1) * weight).sum()

    def of_held_out():
        with torch.no_grad():
            return sum(error(*each).item() for each in seen[:held])

    before, steps = of_held_out(), len(seen) - held
    for step in range(steps * passes):
        done = (step + 0.5) / (steps * passes)
        optimizer.zero_grad()
        error(*seen[held + step % steps]).backward()
        for weight in weights.values():  # of an expert that no token chose
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(done / 0.05, 0.5 + 0.5 * np.cos(np.pi * done))
        optimizer.step()
    after = of_held_out()
    best = weights if after < before else start
    fitted = {canonical: best[theirs].detach() for group in groups for theirs, canonical in group.items()}
    return fitted, min(after / before, 1.0)


def of_kept_channels(plan: PrunePlan, local, tensor):
    """The matrix less the hidden channels that the plan cuts: the columns of what reads the stream, else the rows."""
    hidden = plan.indices("hidden")
    if hidden is None:
        return tensor
    writes = local.split(".")[-2] in ("o", "down", "out")
    return tensor[hidden] if writes else tensor[:, hidden]
