"""A shape's time: what is run, how often, and that its median without the first is told."""

import itertools
import statistics

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation import forward_seconds, latency


def test_the_median_after_warming_up(monkeypatch):
    """A clock that runs by what each pass is to take; the first one's time does not count."""
    from transformers import LlamaForCausalLM

    passes, seen = [9.0, 0.5, 0.1, 0.4, 0.2, 0.3], []
    times = itertools.accumulate(step for took in passes for step in (0.0, took))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(times))
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward",
        lambda self, tokens, **options: seen.append((self.config.num_hidden_layers, self.dtype, *tokens.shape))
        or forward(self, tokens, **options),
    )  # fmt: skip
    took = forward_seconds({"model_type": "llama", **SIZES}, batch=2, context=5, precision="fp32")
    assert took == pytest.approx(statistics.median(passes[1:]))
    assert {(layers, str(dtype), *shape) for layers, dtype, *shape in seen} == {(6, "torch.float32", 2, 5)}
    assert len(seen) == 6


def test_unknown_precision():
    with pytest.raises(InputError, match="precision 'fp8' is unknown here"):
        forward_seconds({"model_type": "llama", **SIZES}, batch=1, context=1, precision="fp8")
