"""What a model says of each window, beside another model; and how fast it answers."""

import sys

import numpy as np
import pytest
from pico import pico_llama

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation import Windows, evaluate, speeds


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    return [pico_llama(folder / str(seed), num_hidden_layers=2, seed=seed) for seed in (0, 1)]


def logits(folder, windows):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(windows)).logits.double()


def test_a_student_beside_its_teacher(models, tmp_path):
    """Against transformers' logits in float64; the errors are those of the means over windows."""
    import torch

    windows = np.random.default_rng(0).integers(0, 509, (6, 17))
    teacher, student = (evaluate(folder, windows, precision="fp32", batch_size=4) for folder in models)
    scores = [logits(folder, windows)[:, :-1] for folder in models]
    targets = torch.from_numpy(windows)[:, 1:]
    losses = [-score.log_softmax(-1).gather(-1, targets[..., None])[..., 0].mean(1).numpy() for score in scores]
    same = (scores[0].argmax(-1) == scores[1].argmax(-1)).double().mean(1).numpy()
    for numbers, loss in zip((teacher, student), losses, strict=True):
        assert numbers.windows.losses_N == pytest.approx(loss, rel=1e-5)
        assert numbers.loss_error == pytest.approx(loss.std(ddof=1) / 6**0.5, rel=1e-3)
    teacher.windows.save(tmp_path / "windows.npz")
    found = student.windows.beside(Windows.load(tmp_path / "windows.npz"))
    gap = losses[1] - losses[0]
    assert found["gap"] == pytest.approx(gap.mean(), abs=1e-5)
    assert found["gap_error"] == pytest.approx(gap.std(ddof=1) / 6**0.5, rel=1e-3)
    assert (found["agreement"], found["agreement_error"]) == pytest.approx((same.mean(), same.std(ddof=1) / 6**0.5))


def test_a_model_beside_itself_and_beside_other_windows(models):
    windows = np.random.default_rng(1).integers(0, 509, (1, 9))
    seen = evaluate(models[0], windows, precision="fp32").windows
    assert seen.beside(seen) == {"gap": 0.0, "gap_error": None, "agreement": 1.0, "agreement_error": None}
    assert seen.beside(evaluate(models[0], windows[:, :5], precision="fp32").windows) == {}


@pytest.mark.parametrize("raw", [b"", b"PK no zip", None])
def test_damaged_windows(tmp_path, raw):
    if raw is not None:
        (tmp_path / "windows.npz").write_bytes(raw)
    with pytest.raises(InputError, match=r"the teacher's windows '.*windows.npz' cannot be read"):
        Windows.load(tmp_path / "windows.npz")


@pytest.mark.parametrize("together", [True, False])
def test_the_speeds_of_answers(models, monkeypatch, together):
    """A clock that every look moves on by a second: one second to the first token, and one for all that follow."""
    room = sys.modules["nemo_minitron.evaluation.speed"]
    ticks, order = iter(range(1000)), []
    answer = room._answer
    monkeypatch.setattr(room.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(room, "_answer", lambda model, *rest: (order.append(id(model)), answer(model, *rest))[1])
    monkeypatch.setattr(room, "_fit_together", lambda folders: together)
    found = speeds(dict(zip("ab", models, strict=True)), precision="fp32", prompt=300, new=8)  # of 256 positions
    for row in found.values():
        assert (row["latency"], row["tokens_per_second"], row["prompt"], row["new"]) == (1.0, 8.0, 248, 8)
        assert (row["precision"], row["in_turn"]) == ("fp32", together)
        assert row["device"].startswith("CPU, ")
    a, b = order[0], next(other for other in order if other != order[0])
    assert order == ([a, b] * 3 if together else [a] * 3 + [b] * 3)


def test_models_that_do_not_fit_together(models, monkeypatch):
    room = sys.modules["nemo_minitron.evaluation.speed"]
    assert room._fit_together(models)
    monkeypatch.setattr(room.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 100)
    assert not room._fit_together(models)


def test_a_slow_machine_does_one_round(models, monkeypatch):
    room = sys.modules["nemo_minitron.evaluation.speed"]
    rounds, answer = [], room._answer
    monkeypatch.setattr(room, "_answer", lambda *asked: (rounds.append(1), answer(*asked))[1])
    monkeypatch.setattr(room, "LONGEST", -1)
    speeds(dict(zip("ab", models, strict=True)), precision="fp32", prompt=8, new=2)
    assert len(rounds) == 2
