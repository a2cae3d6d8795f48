"""Started by torchrun: two FP8 linears, column- then row-parallel, over two ranks against one process's product.

`fp8_worker.py OUT.json`: recipe and layout -> the largest difference of outputs and gradients over two passes, the
second three times as large, relative to the largest element.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from workers import process_group

IN, FFN, TOKENS = 48, 96, 12


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_process(recipe):
    """[(y, dx) of each pass], dw1, dw2 of whole matrices."""
    from nemo_minitron.backend import fp8

    scalings = [fp8.Delayed() if recipe == "delayed" else fp8.Current() for _ in "12"]
    w1, w2 = random(FFN, IN, seed=1).requires_grad_(), random(IN, FFN, seed=2).requires_grad_()
    return run(lambda x: fp8.linear(fp8.linear(x, w1, scalings[0]), w2, scalings[1]), (w1, w2), slice(None))


def run(forward, weights, rows):
    """Two passes; of the sequence, `rows` are this rank's."""
    found = []
    for scale in (1.0, 3.0):
        x = (random(TOKENS, 1, IN, seed=3) * scale)[rows].requires_grad_()
        y = forward(x)
        y.backward((random(TOKENS, 1, IN, seed=4) * scale)[rows])
        found += [y.detach(), x.grad]
    return [*found, *(weight.grad for weight in weights)]


def two_ranks(recipe, sp):
    import bare_models

    from nemo_minitron.backend.precision import EMULATED
    from nemo_minitron.backend.reference import ColumnLinear, RowLinear

    config = bare_models.config("llama", sequence_parallel=sp)
    setattr(config, EMULATED, recipe)
    options = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False, "skip_bias_add": True}
    fc1 = ColumnLinear(IN, FFN, gather_output=False, is_expert=False, **options)
    fc2 = RowLinear(FFN, IN, input_is_parallel=True, is_expert=False, **options)
    rank = torch.distributed.get_rank()
    mine = slice(rank * FFN // 2, (rank + 1) * FFN // 2)
    with torch.no_grad():
        fc1.weight.copy_(random(FFN, IN, seed=1)[mine])
        fc2.weight.copy_(random(IN, FFN, seed=2)[:, mine])
    rows = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2) if sp else slice(None)
    return run(lambda x: fc2(fc1(x)[0])[0], (fc1.weight, fc2.weight), rows), rows, mine


def difference(recipe, sp):
    got, rows, mine = two_ranks(recipe, sp)
    wanted = one_process(recipe)
    parts = [*(whole[rows] for whole in wanted[:4]), wanted[4][mine], wanted[5][:, mine]]
    worst = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, parts, strict=True)]
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, max(worst))
    return max(everyone)


def main():
    with process_group():
        import bare_models

        bare_models.start(tp=2)
        cases = [(recipe, sp) for recipe in ("delayed", "tensorwise") for sp in (False, True)]
        found = {f"{recipe}{'_sp' * sp}": difference(recipe, sp) for recipe, sp in cases}
        if torch.distributed.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
