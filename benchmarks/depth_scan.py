"""Measures the loss without each layer of a real model in one run: our scan, a naive scan, and the computed floor:
`python benchmarks/depth_scan.py MODEL DATA [--rows 2] [--sequence 512] [--repeat 3]`.

The floor is the time of (L + 1) L / 2 layer forwards and L + 1 output heads, each measured by itself in the same run.
The naive scan is one full forward pass of the same Megatron model without the layer, for every layer. The three are
measured in turn, `--repeat` times, and the medians compared. Times are this process's processor time (all its threads),
which other jobs on the machine disturb least; wall time is recorded beside it. Writes
`benchmarks/results/DATE_depth_scan.json`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch

import nemo_minitron.backend as backend


class Parts:
    """The model's own pieces, called as its forward pass calls them."""

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        self.layers = model.decoder.layers
        self.hidden, self.rotary, *_ = model._preprocess(tokens, self.positions)

    def layer(self) -> None:
        for layer in self.layers:
            layer(self.hidden, attention_mask=None, rotary_pos_emb=self.rotary)

    def head(self) -> None:
        hidden = self.model.decoder.final_layernorm(self.hidden)
        weight = self.model.shared_embedding_or_output_weight()
        logits, _ = self.model.output_layer(hidden, weight=weight)
        self.loss(logits.transpose(0, 1))

    def loss(self, logits: torch.Tensor) -> float:
        labels = self.tokens[:, 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(labels), -1), labels).item()

    def naive(self) -> dict[tuple[int, int], float]:
        """One full forward pass for each number, with layers taken out of the model."""
        losses = {}
        try:
            for dropped in range(-1, len(self.layers)):
                kept = [layer for i, layer in enumerate(self.layers) if i != dropped]
                self.model.decoder.layers = torch.nn.ModuleList(kept)
                block = (dropped, dropped) if dropped >= 0 else (0, -1)
                losses[block] = self.loss(self.model(self.tokens, self.positions, None))
        finally:
            self.model.decoder.layers = self.layers
        return losses


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def measure(model: Any, tokens: torch.Tensor, repeat: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each repetition, and the largest relative difference between ours and the naive losses."""
    from nemo_minitron.importance.depth import depth_scan

    seconds: dict[str, list[float]] = {name: [] for name in ("layer", "head", "ours", "naive")}
    with torch.no_grad():
        parts = Parts(model.eval(), tokens)
        count, difference = len(parts.layers), 0.0
        parts.layer()
        parts.head()  # warm
        for _ in range(repeat):
            # Before and after each scan, so that a machine that slows down also slows down the floor.
            before = timed(parts.layer)[0], timed(parts.head)[0]
            took, ours = timed(lambda: depth_scan(model, [tokens]))
            seconds["ours"].append(took)
            behind = timed(parts.layer)[0], timed(parts.head)[0]
            seconds["layer"].append((before[0] + behind[0]) / 2 / count)
            seconds["head"].append((before[1] + behind[1]) / 2)
            took, naive = timed(parts.naive)
            seconds["naive"].append(took)
            difference = max(abs(ours[block] - naive[block]) / naive[block] for block in naive)
    return seconds, difference


def table(seconds: dict[str, list[float]], layers: int) -> dict[str, float]:
    """Medians, and the ratios; prints them."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    floor = [
        layer * layers * (layers + 1) / 2 + head * (layers + 1)
        for layer, head in zip(seconds["layer"], seconds["head"], strict=True)
    ]
    middle["floor"] = statistics.median(floor)
    middle["ours / floor"] = statistics.median(a / b for a, b in zip(seconds["ours"], floor, strict=True))
    middle["ours / naive"] = middle["ours"] / middle["naive"]
    middle["floor / naive, counted"] = _counted(middle["head"] / middle["layer"], layers)
    for name, value in middle.items():
        print(f"{name:24}{value:10.4f}{'' if '/' in name else ' s'}")
    return middle


def _counted(head: float, layers: int) -> float:
    """The counted ratio; `head`: the cost of the output head in layers."""
    return (layers * (layers + 1) / 2 + (layers + 1) * head) / (layers * layers + (layers + 1) * head)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    for name, default in {"rows": 2, "sequence": 512, "repeat": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    result = common.heading(("torch", "megatron-core"))
    result["machine"]["threads"] = torch.get_num_threads()
    backend.setup()
    from nemo_minitron.nemo import load_model

    (model,) = load_model(options.model)
    tokens, began = common.token_rows(options.model, options.data, options.rows, options.sequence), time.perf_counter()
    seconds, difference = measure(model, tokens, options.repeat)
    wall = time.perf_counter() - began
    layers = len(model.decoder.layers)
    print(f"{options.model}, {layers} layers, {options.rows} x {options.sequence} tokens, {result['machine']}")
    middle = table(seconds, layers)
    print(f"{'ours against naive':24}{difference:10.1e} of the loss, at most")
    result |= {
        "layers": layers,
        "tokens": tokens.numel(),
        "medians": middle,
        "seconds": seconds,
        "wall seconds of all repetitions": wall,
        "largest relative difference to naive": difference,
    }
    common.write(result, common.dated("depth_scan"))


if __name__ == "__main__":
    main()
