"""Run by ranks.py, once for each world size: scores of every kind of model that Megatron's GPTModel can be, in
every layout of that size, on bare Megatron modules.

Arguments: a folder (masks and the kinds' checkpoints, which the run in one process writes), JSON list of cases,
output folder. Rank 0 writes the scores of a case.
"""

import itertools
import json

import numpy as np
from workers import process_group, run_cases

CRITERIA = ["l2,mean", "mean,l2", "l2,var", "mean,max"]
BOUNDARIES = [[0, 7, 16, 22], [0, 24], [0, 1, 13, 24], [0, 3, 20]]  # of packed rows; some leave a tail
EXTRA = {  # axes beside the default ones
    "qk_norm": ["q_norm", "k_norm"],
    "mla": ["q_latent", "kv_latent", "head_channels"],
    "mla_moe": ["q_latent", "kv_latent", "head_channels"],
    "nemotron": ["ffn_pre_activation"],
    "gpt": ["ffn_pre_activation"],
}
DEFAULT = ["heads", "norms", "layers"]
DROPPING = [
    ("moe_expert_capacity_factor", 1.0), ("moe_router_padding_for_fp8", True), ("moe_token_dispatcher_type", "flex"),
]  # fmt: skip
MIXTURE = ["ffn", "experts", "expert_ffn", "shared_expert_ffn"]


def axes_of(kind):
    return [*DEFAULT, *(MIXTURE if "moe" in kind else ["ffn"]), *EXTRA.get(kind, [])]


def batches_of(kind, folder):
    """This data-parallel rank's batches: plain rows, rows with masks dealt unevenly, or packed rows."""
    import bare_models
    import torch
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    tokens = bare_models.tokens(12)
    if kind == "plain":
        return [batch[rank::size] for batch in tokens.split(2 * size)]
    if kind == "masked":
        mask = torch.from_numpy(np.load(folder / "mask.npy"))
        first = [0, 8, 12] if size == 2 else np.linspace(0, 12, size + 1).astype(int)  # ranks get 8 and 4 rows
        mine = slice(first[rank], first[rank + 1])
        return [{"tokens": t, "loss_mask": m} for t, m in zip(tokens[mine].split(4), mask[mine].split(4), strict=True)]
    rows = [{"tokens": tokens[k : k + 1], "cu_seqlens": torch.tensor([b])} for k, b in enumerate(BOUNDARIES)]
    return rows[rank::size]


def load(case, folder):
    """The kind's weights in the case's layout; one process writes them first."""
    import bare_models

    sizes = {k: v for k, v in case["layout"].items() if k in ("tp", "pp", "vp", "cp", "ep", "etp")}
    bare_models.start(**sizes)
    options = {"sequence_parallel": case["layout"].get("sp", False), **case.get("options", {})}
    chunks = bare_models.build(case["kind"], **options)
    checkpoint = folder / case["kind"]
    if case["world"] == 1 and not checkpoint.exists():
        bare_models.save_bare(chunks, checkpoint)
    bare_models.load_bare(chunks, checkpoint)
    return chunks


def run_case(case, folder, out):
    import torch

    from nemo_minitron.importance import estimate
    from nemo_minitron.importance.forward import architecture_of

    chunks, found = load(case, folder), {}
    true = architecture_of(chunks[0]).replace(vocab_size=509)  # what is behind it is padding
    if case.get("grouped"):
        group(chunks)
    for kind in case["batches"]:
        found[kind] = estimate(chunks, batches_of(kind, folder), criterion=CRITERIA, axes=axes_of(case["kind"]))
    for kind in case.get("taylor", ()):
        found[f"taylor-{kind}"] = estimate(
            chunks, batches_of(kind, folder), criterion=CRITERIA, method="taylor", architecture=true
        )
    for mutation, kind in case["mutations"]:
        import mutations

        with mutations.MUTATIONS[mutation]():
            found[mutation] = estimate(chunks, batches_of(kind, folder), criterion=CRITERIA, axes=axes_of(case["kind"]))
    if len(chunks) > 1:
        told = refusal(chunks, batches_of("plain", folder), method="taylor")
        if torch.distributed.get_rank() == 0:
            (out / "virtual.json").write_text(json.dumps(told))
    if case["world"] == 1 and not case.get("grouped"):
        checks(case["kind"], chunks, folder, out)
        by_the_book(case, chunks[0], folder, out)
    if torch.distributed.get_rank() == 0:
        for kind, scores in found.items():
            scores.save(out / f"{case['name']}-{kind}.safetensors")


def by_the_book(case, model, folder, out):
    """The float64 reference of each of the case's scores; the model is float64 from here on."""
    from kinds64 import scores_by_the_book

    model.double().eval()
    for kind in case["batches"]:
        np.savez(out / f"{case['name']}-{kind}.npz", **scores_by_the_book(model, samples_of(kind, folder), CRITERIA))
    for kind in case.get("taylor", ()):
        scores = scores_by_the_book(model, samples_of(kind, folder), CRITERIA, 509)
        np.savez(out / f"{case['name']}-taylor-{kind}.npz", **scores)


def samples_of(kind, folder):
    """The samples that a kind of batches holds, each as tokens; padding never is one."""
    import bare_models

    tokens = bare_models.tokens(12).numpy()
    if kind == "plain":
        return list(tokens)
    if kind == "masked":
        mask = np.load(folder / "mask.npy")
        return [row[: int(own.sum())] for row, own in zip(tokens, mask, strict=True) if own.any()]
    return [tokens[k, a:b] for k, bounds in enumerate(BOUNDARIES) for a, b in itertools.pairwise(bounds)]


def group(chunks):
    """Experts in the shape of Transformer Engine's grouped linears, which need CUDA: all tokens in one tensor."""
    import torch
    from megatron.core.transformer.moe.moe_layer import MoELayer

    class Grouped(torch.nn.Module):
        """y = x W^T for each expert's tokens in turn."""

        def __init__(self, linears):
            super().__init__()
            self.weights = [linear.weight for linear in linears]

        def forward(self, x, splits):
            parts = zip(x.split(splits), self.weights, strict=True)
            return torch.cat([part @ weight.t() for part, weight in parts]), None

    class GroupedMLP(torch.nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.linear_fc1 = Grouped([expert.linear_fc1 for expert in experts])
            self.linear_fc2 = Grouped([expert.linear_fc2 for expert in experts])

        def forward(self, hidden, tokens_per_expert, probs):
            splits = tokens_per_expert.tolist()
            gate, up = self.linear_fc1(hidden, splits)[0].chunk(2, -1)
            return self.linear_fc2(torch.nn.functional.silu(gate) * up * probs[:, None], splits)

    for chunk in chunks:
        for module in list(chunk.modules()):
            if isinstance(module, MoELayer):
                module.experts = GroupedMLP(module.experts.local_experts)


def checks(kind, chunks, folder, out):
    """In one process: the same outputs with hooks, none left after an error, and what the model says of itself."""
    import bare_models
    import torch

    from nemo_minitron.importance import Collector
    from nemo_minitron.importance.forward import architecture_of, estimate, evaluating

    architecture, tokens = architecture_of(chunks[0]), bare_models.tokens(2)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)

    def forward():
        with evaluating(chunks), torch.no_grad():
            return chunks[0](tokens, positions, None)

    before = forward()
    with Collector(chunks, architecture, axes=axes_of(kind)) as collector:
        collector.expect({"tokens": tokens})
        during = forward()
    failed = {method: fails(chunks, batches_of("plain", folder), method) for method in ("activation", "taylor")}
    frozen = chunks[0].decoder.layers[-1].self_attention.linear_proj.weight
    frozen.requires_grad_(False)
    estimate(chunks, batches_of("plain", folder)[:1], method="taylor")
    result = {
        "equal": torch.equal(before, during) and torch.equal(before, forward()),
        "failed": failed,
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in chunks[0].modules()),
        "frozen": [name for name, p in chunks[0].named_parameters() if not p.requires_grad],
        "gradients": sum(p.grad is not None for p in chunks[0].parameters()),
        "architecture": architecture.as_dict(),
        "refused": refused(chunks, batches_of("plain", folder), kind),
    }
    (out / f"{kind}.json").write_text(json.dumps(result))


def refused(chunks, batches, kind):
    """What a model, or a method, that cannot be scored is told."""
    told = {"method": refusal(chunks, batches, method="tailor")}
    if kind == "mla":
        told["axis"] = refusal(chunks, batches, method="taylor", axes=["kv_latent"])
    for option, value in DROPPING if kind == "moe" else ():
        config = chunks[0].config
        before = getattr(config, option)
        setattr(config, option, value)
        told[option] = refusal(chunks, batches)
        setattr(config, option, before)
    return told


def refusal(chunks, batches, **options):
    from nemo_minitron.errors import InputError
    from nemo_minitron.importance import estimate

    try:
        estimate(chunks, batches, **options)
    except InputError as error:
        return str(error)
    return None


def fails(chunks, batches, method):
    """The error in the middle of a pass: of the last layer's second micro-batch."""
    from nemo_minitron.importance import estimate

    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("a module failed")

    handle = chunks[-1].decoder.layers[-1].register_forward_hook(fail)
    try:
        estimate(chunks, batches, method=method)
    except RuntimeError as error:
        return str(error)
    finally:
        handle.remove()
    return None


def main():
    with process_group():
        run_cases(run_case)


if __name__ == "__main__":
    main()
