"""The published shapes of Qwen3-8B at 6B, on paper:
`python benchmarks/proxy_published.py benchmarks/results/2026-11-30_proxy.json`.

NVIDIA published six shapes with their MMLU (github.com/NVIDIA/Model-Optimizer, issue 1024). `search.proxy=losses` adds
rises of the loss that are measured on the model itself, which is not here. This script asks whether those of SmolLM2
(of `proxy.py`), taken at the same shares of layers, hidden channels and neurons, would order the shapes.
"""

from __future__ import annotations

import json
from pathlib import Path

import common
import numpy as np
from search import spearman

from nemo_minitron.search.marginals import Marginals

SMOLLM2, QWEN3 = {"layers": 30, "hidden": 576, "ffn": 1536}, {"layers": 36, "hidden": 4096, "ffn": 12288}
MMLU = {
    (30, 3584, 11776): 0.572, (32, 3584, 10752): 0.542, (36, 3840, 8192): 0.511, (36, 3584, 9216): 0.477,
    (34, 3328, 11264): 0.390, (36, 3072, 11776): 0.278,
}  # fmt: skip


def rises(losses: dict[str, float]) -> list[float]:
    """The sum of the rises of each shape, in nats, in the order of MMLU."""
    alone = {
        axis: {int(size): loss for name, loss in losses.items() if (size := name.removeprefix(axis)).isdecimal()}
        for axis in SMOLLM2
    }
    guess = Marginals(losses["teacher"], alone, SMOLLM2, groups=3)
    sizes = {
        axis: np.array([shape[at] / QWEN3[axis] * length for shape in MMLU])
        for at, (axis, length) in enumerate(SMOLLM2.items())
    }
    return (-np.log(guess(sizes))).tolist()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("result", type=Path, help="of proxy.py")
    found = rises(json.loads(parser.parse_args().result.read_text())["losses"])
    for shape, rise in zip(MMLU, found, strict=True):
        print("{:>3} layers, hidden {}, ffn {:>6}".format(*shape), f"  MMLU {MMLU[shape]:.3f}   rise {rise:.2f} nats")
    print(
        f"Spearman of MMLU and the rise, with its sign turned: {spearman([-x for x in found], list(MMLU.values())):.2f}"
    )


if __name__ == "__main__":
    main()
