"""Scores and records of a logit cache whose numbers are none are neither written nor read."""

import numpy as np
import pytest
from pico import SIZES

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.artifacts.logit_records import Codec, Kept
from nemo_minitron.artifacts.statistics import AGGREGATIONS
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf

ARCHITECTURE = from_hf(SIZES | {"architectures": ["LlamaForCausalLM"]})


def scores():
    return Scores(
        ARCHITECTURE, {"layers": np.ones(6, np.float32)}, depth={"loss": {(0, -1): 2.0, (1, 1): 3.0}},
        states={f"layers/tokens,mean/{field}": np.ones((6, 2)) for field in AGGREGATIONS["mean"].fields},
    )  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["tensors", "states", "depth"])
def test_scores(tmp_path, monkeypatch, where, bad):
    spoilt = scores()
    if where == "depth":
        spoilt.depth["loss"][1, 1] = bad
    else:
        next(iter(getattr(spoilt, where).values())).flat[0] = bad
    words = f"loss of block 1 to 1 is {bad}" if where == "depth" else "'layers.*' holds a number that is not finite"
    with pytest.raises(InputError, match=words):
        spoilt.save(tmp_path / "scores.safetensors")
    assert not any(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Scores, "_check_finite", lambda *_: None)  # as an older version, or another tool, writes it
        spoilt.save(tmp_path / "scores.safetensors")
    read = rf"'depth\.loss\.\d\.2' is {bad}, not a finite number" if where == "depth" else words
    with pytest.raises(InputError, match=read):
        Scores.load(tmp_path / "scores.safetensors")


def test_scores_that_are_whole(tmp_path):
    scores().save(tmp_path / "scores.safetensors")
    assert Scores.load(tmp_path / "scores.safetensors").depth == scores().depth


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5])
@pytest.mark.parametrize("part", ["factors", "tail"])
def test_records(part, bad):
    codec = Codec(CacheSettings(sequence_length=3, mode="top-k", k=2), 509)
    numbers = {"factors": np.full(6, 0.25, np.float32), "tail": np.full(3, 0.5, np.float32)}
    record = Kept(np.full(3, 2), np.arange(6), None, numbers["factors"], numbers["tail"])
    assert codec.decode(codec.encode(record)).tail.tolist() == [0.5] * 3
    numbers[part][1] = bad
    with pytest.raises(InputError, match="holds a number that is no probability"):
        codec.decode(codec.encode(record))
