"""Run by ranks.py, once for each world size: Gram matrices in every layout of that size.

Arguments: folder of pico models, JSON list of cases, output folder. Rank 0 writes one .npz a case.
"""

import numpy as np
import torch
from depth_worker import own_batches
from ranks import leave_layout
from tolerances import GRAM_FP32
from workers import load_model, process_group, run_cases


class Grouped(torch.nn.Module):
    """As Transformer Engine's grouped MLP: one linear sees the tokens of all local experts, one after another."""

    def __init__(self, sequential):
        super().__init__()
        self.local_experts, self.linear_fc2, self.came = sequential.local_experts, torch.nn.Identity(), []
        for expert in self.local_experts:
            expert.linear_fc2.register_forward_pre_hook(lambda module, args: self.came.append(args[0]))

    def forward(self, hidden, tokens_per_expert, probabilities):
        self.came.clear()
        sizes = tokens_per_expert.tolist()
        parts = zip(self.local_experts, hidden.split(sizes), probabilities.split(sizes), strict=True)
        outputs = [expert(*given)[0] for expert, *given in parts]
        self.linear_fc2(torch.cat(self.came))
        return torch.cat(outputs), None


def run_case(case, folder):
    """Every G of the model, gathered from the pipeline's stages; one layer at a time, all at once, and of the second
    half of the samples."""
    from nemo_minitron.importance.gram import gram, whole
    from nemo_minitron.settings.layout import Layout

    layout = Layout(**case["layout"])
    chunks = load_model(folder / case["model"], layout=layout)
    if case["model"] == "grouped":
        for layer in chunks[0].decoder.layers:
            layer.mlp.experts = Grouped(layer.mlp.experts)
    hooks = [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    kind = "down" if case["model"] == "dense" else "experts"
    grams, one = gram(chunks, own_batches(folder)), gram(chunks, own_batches(folder), [4], [kind])
    assert hooks == [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    for name, g in grams.items():
        shards = layout.expert_tp if ".experts." in name else layout.tp
        assert (g.shape[0] * shards, g.dtype) == (g.shape[1], torch.float64)
    assert set(one) == {name for name in grams if name.startswith(f"layers.4.{kind}.")}
    assert all(torch.equal(g, grams[name]) for name, g in one.items())
    halves = gram(chunks, own_batches(folder), halves=True)
    found = {name: g for name in grams if (g := whole(grams, name)) is not None}
    for name in grams:
        both = whole(halves, name)
        assert (both is None) == (name not in found)
        if both is not None:
            np.testing.assert_allclose(both.sum(0), found[name], rtol=0, atol=GRAM_FP32 * np.abs(found[name]).max())
            found[f"{name} of the second half"] = both[1]
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    leave_layout()
    merged = {}
    for part in everyone:
        assert not part.keys() & merged.keys()  # one rank has it
        merged |= part
    return merged


def write_case(case, folder, out):
    grams = run_case(case, folder)
    if torch.distributed.get_rank() == 0:
        np.savez(out / f"{case['name']}.npz", **grams)


def main():
    with process_group():
        run_cases(write_case)


if __name__ == "__main__":
    main()
