"""Dense students of a mixture of experts, an experiment: `python benchmarks/dense_students.py`.

It trains a small byte-level mixture (8 experts, 2 a token) on the demo's text, and makes students of it, each layer's
mixture replaced: by half of its experts (REAP); by the same half with the others merged into it, as
`cutting.merge_experts` does; or by one dense MLP as wide as the experts that are concatenated in it. `concatenated`:
the experts of the highest scores, their outputs times the mean gate. `grouped`: all experts, put into groups by the
likeness of their routers' rows, averaged in each by their scores, then concatenated. `fitted`: the concatenated experts
with their last matrices solved again by least squares, as `minitron compensate` solves them. `random`: a dense MLP of
the same width. Losses are in nats a byte on held-out text, before and after a short distillation (forward KL) with the
same batches. Everything is plain PyTorch and transformers, but for the rule of merging, which is the package's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_minitron.pruning.merging import match, nearest_kept, shares

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 256, "moe_intermediate_size": 192, "intermediate_size": 384, "head_dim": 32}
EXPERTS, TOPK, LENGTH, BATCH = 8, 2, 256, 16
RIDGE = 0.01  # of the mean diagonal, as `cutting.ridge`


class Dense(nn.Module):
    """Experts one beside the other as one gated MLP. Weights: gate, up [F, H], down [H, F]."""

    def __init__(self, gate_FH: Tensor, up_FH: Tensor, down_HF: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w.detach().clone()) for w in (gate_FH, up_FH, down_HF))

    def inner(self, x: Tensor) -> Tensor:
        return F.silu(x @ self.gate.T) * (x @ self.up.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.down.T


class Mixture(nn.Module):
    """A router [E, H] and its experts; the gates of the chosen ones sum to 1."""

    def __init__(self, router_EH: Tensor, experts: list[Dense], topk: int) -> None:
        super().__init__()
        self.router, self.experts, self.topk = nn.Parameter(router_EH.detach().clone()), nn.ModuleList(experts), topk

    def gates(self, x: Tensor) -> Tensor:
        """The gate of each expert, zero where it is not chosen, [..., E]."""
        chance = (x @ self.router.T).softmax(-1)
        best, at = chance.topk(self.topk, -1)
        return torch.zeros_like(chance).scatter(-1, at, best / best.sum(-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        return sum((expert(x) * gates[..., e, None] for e, expert in enumerate(self.experts)), torch.zeros_like(x))


def fresh(width: int) -> Dense:
    hidden = SIZES["hidden_size"]
    return Dense(*(0.02 * torch.randn(*shape) for shape in ((width, hidden), (width, hidden), (hidden, width))))


def mixture_model() -> Any:
    """transformers' Qwen3 with a mixture in place of each MLP."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    dense = {name: size for name, size in SIZES.items() if not name.startswith("moe")}
    model = Qwen3ForCausalLM(Qwen3Config(**dense, tie_word_embeddings=True))
    for layer in model.model.layers:
        experts = [fresh(SIZES["moe_intermediate_size"]) for _ in range(EXPERTS)]
        layer.mlp = Mixture(0.02 * torch.randn(EXPERTS, SIZES["hidden_size"]), experts, TOPK)
    return model


def batches(text: Tensor, count: int, seed: int) -> list[Tensor]:
    """Random windows of bytes, [batch, length] each."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (count, BATCH), generator=draw)
    return [torch.stack([text[at : at + LENGTH] for at in row]) for row in starts.tolist()]


def train(model: Any, rows: list[Tensor], rate: float, teacher: Any = None) -> None:
    """AdamW with a cosine: on the text, or on the teacher's logits. A mixture's router also learns to spread its tokens
    (the usual load-balancing loss, 0.01)."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(rows), pct_start=0.1)
    for row in rows:
        spread: list[Tensor] = []
        hooks = [m.register_forward_hook(_balance(spread)) for m in model.modules() if isinstance(m, Mixture)]
        logits = model(row).logits
        for hook in hooks:
            hook.remove()
        if teacher is None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten()) + 0.01 * sum(spread)
        else:
            with torch.no_grad():
                aim = teacher(row).logits.log_softmax(-1)
            loss = F.kl_div(logits.log_softmax(-1), aim, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _balance(found: list[Tensor]) -> Any:
    def hook(module: Mixture, inputs: tuple[Tensor], output: Tensor) -> None:
        used = (module.gates(inputs[0]) > 0).float().mean((0, 1))
        chance = (inputs[0] @ module.router.T).softmax(-1).mean((0, 1))
        found.append(EXPERTS * (used * chance).sum() / module.topk)

    return hook


@torch.no_grad()
def loss_of(model: Any, rows: list[Tensor]) -> float:
    losses = [F.cross_entropy(model(row).logits[:, :-1].flatten(0, 1), row[:, 1:].flatten()) for row in rows]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def inputs_of(model: Any, rows: list[Tensor]) -> list[Tensor]:
    """What each mixture reads, [tokens, H] a layer."""
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda m, x, into=into: into.append(x[0].flatten(0, 1)))
        for layer, into in zip(model.model.layers, found, strict=True)
    ]
    for row in rows:
        model(row)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def reap(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """REAP (mean over an expert's tokens of gate times norm of its output), and the mean gate over all tokens, [E]."""
    gates = mixture.gates(x)
    norms = torch.stack([expert(x).norm(dim=-1) for expert in mixture.experts], -1)
    return (gates * norms).sum(0) / (gates > 0).sum(0).clamp(min=1), gates.mean(0)


def joined(experts: list[Dense], weights: Tensor) -> Dense:
    gate, up = (torch.cat([getattr(expert, name) for expert in experts]) for name in ("gate", "up"))
    return Dense(gate, up, torch.cat([expert.down * w for expert, w in zip(experts, weights, strict=True)], 1))


def half(mixture: Mixture, x: Tensor, width: int) -> Mixture:
    best = reap(mixture, x)[0].topk(EXPERTS // 2).indices.sort().values
    return Mixture(mixture.router[best], [copy.deepcopy(mixture.experts[e]) for e in best.tolist()], TOPK)


@torch.no_grad()
def merged(mixture: Mixture, x: Tensor, width: int) -> Mixture:
    """The same half; each other expert is merged into it by the package's rule, weighted by how often it is chosen."""
    made, kept = half(mixture, x, width), reap(mixture, x)[0].topk(EXPERTS // 2).indices.sort().values.tolist()
    joins = nearest_kept(mixture.router.detach().numpy(), kept)
    chosen = (mixture.gates(x) > 0).double().mean(0).numpy()
    for leader, expert in zip(kept, made.experts, strict=True):
        members = [leader, *(e for e in joins if joins[e] == leader)]
        orders = [_matched(mixture.experts[leader], mixture.experts[e]) for e in members]
        weights = shares(chosen[members]).tolist()
        for name in NAMES:
            dim = NAMES.index(name) // 2  # of the neurons
            parts = zip((getattr(mixture.experts[e], name) for e in members), orders, weights, strict=True)
            getattr(expert, name).copy_(sum(part.index_select(dim, order) * w for part, order, w in parts))
    return made


def _matched(expert: Dense, other: Dense) -> Tensor:
    weights = [[w.detach().double().numpy() for w in (e.gate, e.up, e.down.T)] for e in (expert, other)]
    return torch.from_numpy(match(zip(*weights, strict=True)))


def concatenated(mixture: Mixture, x: Tensor, width: int) -> Dense:
    scores, gates = reap(mixture, x)
    best = scores.topk(width).indices
    return joined([mixture.experts[e] for e in best.tolist()], gates[best] * gates.sum() / gates[best].sum())


@torch.no_grad()
def grouped(mixture: Mixture, x: Tensor, width: int) -> Dense:
    """The experts of the highest scores lead groups; each other one joins the leader with the nearest router row."""
    scores, gates = reap(mixture, x)
    rows = F.normalize(mixture.router, dim=-1)
    leaders = scores.topk(width).indices
    of = (rows @ rows[leaders].T).argmax(1)
    of[leaders] = torch.arange(width)
    groups, weights = [], []
    for group in range(width):
        members = (of == group).nonzero()[:, 0].tolist()
        share = scores[members] / scores[members].sum()
        parts = [sum(getattr(mixture.experts[e], n) * s for e, s in zip(members, share, strict=True)) for n in NAMES]
        groups.append(Dense(*parts))
        weights.append(gates[members].sum())
    return joined(groups, torch.stack(weights))


@torch.no_grad()
def fitted(mixture: Mixture, x: Tensor, width: int) -> Dense:
    dense = concatenated(mixture, x, width)
    inner, aim = dense.inner(x).double(), mixture(x).double()
    gram = inner.T @ inner
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    dense.down.copy_(torch.linalg.solve(gram, inner.T @ aim).T.float())
    return dense


NAMES = ("gate", "up", "down")
ARMS = {"half of the experts": half, "half, merged": merged, "concatenated": concatenated, "grouped": grouped}
ARMS |= {"fitted": fitted, "random": lambda mixture, x, width: fresh(width * SIZES["moe_intermediate_size"])}


def student(teacher: Any, arm: str, width: int, inputs: list[Tensor]) -> Any:
    made = copy.deepcopy(teacher)
    for layer, x in zip(made.model.layers, inputs, strict=True):
        layer.mlp = ARMS[arm](layer.mlp, x, width)
    return made


def text(name: str) -> Tensor:
    import json

    lines = (common.TEXT / f"{name}.jsonl").read_text().splitlines()
    return torch.tensor(list("\n\n".join(json.loads(line)["text"] for line in lines).encode()), dtype=torch.long)


def run(seed: int, steps: int, brief: int, arms: list[str]) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    learn, held = text("train"), batches(text("test"), 16, 0)
    teacher = mixture_model()
    train(teacher, batches(learn, steps, seed), 3e-3)
    inputs = inputs_of(teacher, batches(learn, 8, seed + 1))  # 32,768 bytes
    rows = [{"arm": "teacher", "experts wide": EXPERTS, "cut": loss_of(teacher, held), "distilled": None}]
    print(rows[-1], flush=True)
    later = batches(learn, brief, seed + 2)
    for width in (2, 4):
        for arm in arms:
            if arm.startswith("half") and width == 2:
                continue
            made = student(teacher, arm, width, inputs)
            cut = loss_of(made, held)
            train(made, later, 1e-3, teacher)
            rows.append({"arm": arm, "experts wide": width, "cut": cut, "distilled": loss_of(made, held)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="of the teacher, 4,096 bytes each")
    parser.add_argument("--brief", type=int, default=150, help="steps of each distillation")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=common.dated("dense_students"))
    given = parser.parse_args()
    result = common.heading(["torch", "transformers"]) | {"seeds": {}}
    for seed in given.seeds:
        result["seeds"][str(seed)] = run(seed, given.steps, given.brief, given.arms)
        common.write(result, given.out)
    for seed, rows in result["seeds"].items():
        print(f"seed {seed}, nats a byte; width in experts of {SIZES['moe_intermediate_size']} neurons")
        for row in rows:
            after = "" if row["distilled"] is None else f"{row['distilled']:10.4f}"
            print(f"{row['arm']:24}{row['experts wide']:4}{row['cut']:10.4f}{after}")


if __name__ == "__main__":
    main()
