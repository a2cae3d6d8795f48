"""transformers' Mamba-2 without kernels, against the recurrence in float64, position by position.

Tried by hand, each makes tests here fail: the states of the cache left out; the convolution's tokens not moved on; the
steps kept above `time_step_min`; the mixers not mended.
"""

import json

import numpy as np
import pytest
from pico import pico_nemotron_h, save_tensors
from tolerances import LOGITS_PICO_FP32
from words import save_tokenizer

pytestmark = pytest.mark.bridge  # transformers 5 alone has the model
TEXTS = [f"the model number {i} reads {i * 7} words and ends." for i in range(90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Slow decays, so that a chunk knows much of those before it; some steps are below transformers' least one."""
    from safetensors.numpy import load_file

    path = pico_nemotron_h(tmp_path_factory.mktemp("hybrid") / "model", vocab_size=509, chunk_size=8)
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if name.endswith("A_log"):
            tensors[name] -= 4
        if name.endswith("dt_bias"):
            tensors[name][:3] = -9
    save_tensors(path, tensors)
    save_tokenizer(path, TEXTS, 509)
    return path


def loaded(folder, mended=True):
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_minitron.evaluation.model import load

    return load(folder, "fp32") if mended else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def recurrence(mixer, states_BSH):
    """The mixer's output in float64 (2405.21060, section 2): h = exp(dt A) h + dt x B, y = h C + D x."""
    import torch
    import torch.nn.functional as F

    p = {name: value.double() for name, value in mixer.state_dict().items()}
    heads, inner, groups = mixer.num_heads, mixer.intermediate_size, mixer.n_groups
    projected = states_BSH.double() @ p["in_proj.weight"].T
    gate, channels, dt = projected.split([inner, mixer.conv_dim, heads], -1)
    padded, weight = F.pad(channels, (0, 0, 3, 0)), p["conv1d.weight"][:, 0]
    length = channels.shape[1]
    convolved = sum(padded[:, i : i + length] * weight[:, i] for i in range(4)) + p["conv1d.bias"]
    x, b, c = F.silu(convolved).split([inner, *[groups * mixer.ssm_state_size] * 2], -1)
    x, b, c = x.unflatten(-1, (heads, -1)), *(part.unflatten(-1, (groups, -1)) for part in (b, c))
    b, c = (part.repeat_interleave(heads // groups, dim=2) for part in (b, c))
    dt = F.softplus(dt + p["dt_bias"])
    state, outputs = torch.zeros(*x[:, 0].shape, b.shape[-1], dtype=torch.float64), []
    for i in range(length):
        decay = torch.exp(-torch.exp(p["A_log"]) * dt[:, i])[..., None, None]
        state = state * decay + (dt[:, i, :, None] * x[:, i])[..., None] * b[:, i, :, None]
        outputs.append((state @ c[:, i, ..., None])[..., 0] + p["D"][:, None] * x[:, i])
    y = (torch.stack(outputs, 1).flatten(-2) * F.silu(gate)).unflatten(-1, (groups, -1))
    normed = y / (y.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon).sqrt()
    return (normed.flatten(-2) * p["norm.weight"]) @ p["out_proj.weight"].T


def test_a_mixer_is_the_recurrence(folder):
    import torch

    states = torch.randn(2, 45, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own, others = (loaded(folder, mended).model.layers[0].mixer for mended in (True, False))
        expected = recurrence(own, states)
        assert (own(states) - expected).abs().max() < 1e-6 * expected.abs().max()
        wrong = (others(states) - expected).abs().amax((0, 2))
        assert wrong[8:].max() > 1e-3 * expected.abs().max()  # what transformers' own code is off by


def test_a_cache_changes_nothing(folder):
    """Token by token, from prompts that are shorter and longer than the convolution and than a chunk."""
    import torch

    model, ids = loaded(folder), torch.randint(0, 509, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        for first in (1, 3, 11):
            parts, past = [], None
            for start, end in [(0, first), *((i, i + 1) for i in range(first, 30))]:
                out = model(ids[:, start:end], past_key_values=past, use_cache=True)
                past = out.past_key_values
                parts.append(out.logits)
            assert (torch.cat(parts, 1) - expected).abs().max() < LOGITS_PICO_FP32
        padded, mask = torch.cat([ids[:, :4], ids], 1), torch.tensor([[0] * 4 + [1] * 30] * 2)
        assert (model(padded, attention_mask=mask).logits[:, 4:] - expected).abs().max() < LOGITS_PICO_FP32


def test_text_and_loss(folder):
    """What is generated is the likeliest token each time; the loss is that of the logits."""
    import torch

    from nemo_minitron.evaluation import evaluate, generate
    from nemo_minitron.families.tokenizer import open_tokenizer

    model, tokenizer = loaded(folder), open_tokenizer(folder)
    (text,) = generate(folder, ["the model number"], max_new_tokens=9, precision="fp32")
    ids = tokenizer("the model number", return_tensors="pt")["input_ids"]
    windows = np.random.default_rng(1).integers(0, 509, (3, 29))
    with torch.no_grad():
        for _ in range(9):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        logits = model(torch.from_numpy(windows)).logits[:, :-1].double()
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(windows[:, 1:]).flatten())
    assert tokenizer.decode(ids[0]).endswith(text)
    assert text
    assert evaluate(folder, windows, precision="fp32").loss == pytest.approx(float(wanted), rel=1e-6)


def test_a_shape_is_timed_with_the_mended_mixers(folder, monkeypatch):
    """Of a config as transformers 5 writes it, with an infinity: six passes through each of the Mamba layers."""
    from nemo_minitron.evaluation import forward_seconds, mamba
    from nemo_minitron.families import from_hf

    config, forward, lengths = json.loads((folder / "config.json").read_text()), mamba._forward, []
    assert config["time_step_limit"][1] == {"__float__": "Infinity"}
    monkeypatch.setattr(
        mamba, "_forward", lambda mixer, states, *more, **named: lengths.append(states.shape[:2])
        or forward(mixer, states, *more, **named)
    )  # fmt: skip
    assert forward_seconds(config, batch=2, context=20, precision="fp32") > 0
    assert lengths == [(2, 20)] * 6 * from_hf(folder).hybrid_pattern.count("M")
