"""Started by torchrun: losses on vocabulary shards, the teacher's cache in every layout of this number of processes.

One process's model is kept as a torch_dist checkpoint, which each layout loads into its own shards, and its logits as
the reference. Arguments: an output folder. Writes there `losses-RANK.json`, `KIND-logits.npy` [rows, S, V] and a
cache `KIND-LAYOUT-MODE` of each. Two processes, being there, also do what main_grad.py asks: `main-grad-RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from workers import process_group

from nemo_minitron.artifacts.cache_settings import CacheSettings

# Shards of 3, 3 and 1 rows, one of two ranks has none at last; of 3, 3, 3 and 1: it has fewer than the other.
ROWS, ROWS_PER_SHARD, MICRO = {"sample": 7, "heat": 10, "top-k": 10}, 3, 2
LAYOUTS = {
    2: {
        "dp2": ("llama", {}, {}),
        "tp2_sp": ("llama", {"tp": 2}, {"sequence_parallel": True}),
        "pp2": ("llama", {"pp": 2}, {}),
        "pp2_vp2": ("llama", {"pp": 2, "vp": 2}, {}),
        "cp2": ("llama", {"cp": 2}, {}),
        "ep2": ("moe", {"ep": 2}, {}),  # over data parallelism, with an odd number of shards: in lockstep
    },
    4: {
        "tp2_sp_pp2": ("llama", {"tp": 2, "pp": 2}, {"sequence_parallel": True}),
        "tp2_cp2": ("llama", {"tp": 2, "cp": 2}, {"sequence_parallel": True}),
        "tp4": ("llama", {"tp": 4}, {}),
    },
}
SETTINGS = {
    "sample": {"draws": 20},
    "heat": {"draws": 12, "sets": 2, "temperature": 2.0, "proposal_temperature": 1.5, "independent": True},
    "top-k": {"mode": "top-k", "k": 12, "temperature": 0.5},
}
SHARDED = [  # mode, vocabulary, temperature, dtype; with 5 tokens the last rank of four holds none
    ("sample", 509, 1.0, "float32"), ("top-k", 509, 1.0, "float32"), ("sample", 512, 2.0, "float32"),
    ("top-k", 509, 0.5, "float32"), ("sample", 5, 1.0, "float32"), ("top-k", 5, 1.0, "float32"),
    ("sample", 509, 1.0, "bfloat16"), ("top-k", 509, 1.0, "bfloat16"),
]  # fmt: skip


def settings(mode):
    import bare_models

    return CacheSettings(sequence_length=bare_models.SEQUENCE, seed=3, precision="fp32", **SETTINGS[mode])


# -- losses on shards --------------------------------------------------------------------------------------
def sharded_loss(mode, vocab, temperature, dtype, rank, world):
    """Differences from the unsharded float64 reference on this rank."""
    from test_cache_losses import SHAPE, made, reference

    loss, targets = made(mode, 1, temperature, vocab=vocab)
    generator = torch.Generator().manual_seed(vocab)
    student = (torch.randn(*SHAPE, vocab, generator=generator) * 3).to(getattr(torch, dtype))
    weights, width = torch.rand(SHAPE, generator=generator), -(-vocab // world)
    padded = torch.nn.functional.pad(student, (0, world * width - vocab), value=torch.nan)
    local = padded[..., rank * width : (rank + 1) * width].clone().requires_grad_()
    whole, true = student.double().requires_grad_(), max(0, min(width, vocab - rank * width))
    value = loss(local, targets, temperature, torch.distributed.group.WORLD, vocab)
    (value * weights).sum().backward()
    expected = reference(whole, targets, temperature)
    (expected * weights).sum().backward()
    wrong = (local.grad[..., :true].double() - whole.grad[..., rank * width : rank * width + true]).abs()
    return {
        "value": ((value - expected).abs() / (1 + expected.abs())).max().item(),
        "gradient": wrong.max().item() if wrong.numel() else 0.0,
        "largest": whole.grad.abs().max().item(),
    }


# -- the cache in every layout -----------------------------------------------------------------------------
def rows(mode="heat"):
    import bare_models

    return bare_models.tokens(max(ROWS.values()))[: ROWS[mode]]


@torch.no_grad()
def one_process(kind, out):
    """The reference: a model that is whole on every rank, its weights and its logits."""
    import bare_models

    bare_models.start()
    chunks = bare_models.build(kind)
    bare_models.save_bare(chunks, out / f"{kind}-weights")
    bare_models.load_bare(chunks, out / f"{kind}-weights")  # rank 0's, on every rank
    tokens = rows()
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = chunks[0].eval()(tokens, places, None)[..., : bare_models.VOCAB]
    if torch.distributed.get_rank() == 0:
        np.save(out / f"{kind}-logits.npy", logits.float().numpy())


def cache(name, kind, sizes, overrides, out):
    import bare_models

    from nemo_minitron.artifacts.logit_cache import CacheHeader, data_digest
    from nemo_minitron.distillation.cache import make

    bare_models.start(**sizes)
    chunks = bare_models.build(kind, perform_initialization=False, **overrides)
    bare_models.load_bare(chunks, out / f"{kind}-weights")
    tokens = rows().numpy()
    for mode, count in ROWS.items():
        folder, digest = out / f"{name}-{mode}", data_digest(lambda i: tokens[i], count, bare_models.SEQUENCE)
        header = CacheHeader(settings(mode), "model", digest, bare_models.VOCAB, count, ROWS_PER_SHARD)
        if torch.distributed.get_rank() == 0:
            header.save(folder)
        torch.distributed.barrier()
        make(chunks, header, folder, lambda i: tokens[i], MICRO)
    if name in ("dp2", "tp4"):  # where each rank has logits
        (out / f"{name}-nan-{torch.distributed.get_rank()}").write_text(refusal(chunks, header, out / f"{name}-nan"))


def refusal(chunks, header, folder):
    """What is said to the logits of weights that are numbers, but too large."""
    from nemo_minitron.distillation.cache import make
    from nemo_minitron.errors import InputError

    chunks[0].decoder.final_layernorm.weight.data.fill_(3e38)
    try:
        make(chunks, header, folder, lambda i: rows().numpy()[i], MICRO)
    except InputError as error:
        return str(error)
    return "nothing"


def main():
    with process_group():
        rank, world, out = torch.distributed.get_rank(), torch.distributed.get_world_size(), Path(sys.argv[1])
        results = [sharded_loss(*case, rank, world) for case in SHARDED]
        (out / f"losses-{rank}.json").write_text(json.dumps(results))
        for kind in dict.fromkeys(kind for kind, _, _ in LAYOUTS[world].values()):  # no set: all ranks in one order
            one_process(kind, out)
        for name, (kind, sizes, overrides) in LAYOUTS[world].items():
            cache(name, kind, sizes, overrides, out)
        if world == 2:
            import main_grad

            found = {name: main_grad.measure(name) for name in main_grad.CASES}
            (out / f"main-grad-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
