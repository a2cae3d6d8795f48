"""A model in rotated coordinates of its residual stream: the same logits, and a cut of its first channels by hand.

Mutations tried by hand, each of which makes tests here fail: a bias that is added to the stream left as it was; the
router read without the norm's weight; the final norm's weight left out of a head of its own; the basis in the order of
rising energy.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from pico import pico_gemma2, pico_llama, pico_nemotron, pico_qwen3, raw_tensors, save_tensors
from tolerances import LOGITS_PICO_FP32, ROTATED_FP32

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

import contract
from test_family_contract import loaded, logits

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.commands.rotate import write_rotated
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.pruning.rotation import Rotated, check_rotation, rotation_of
from nemo_minitron.sources.tensors import whole

TOKENS = np.random.default_rng(3).integers(0, 509, (2, 24))
REFUSED = {"nemotron", "gemma2", "gemma3_text"}
NAMES = [name for name in contract.NAMES if name.split("-")[0] not in REFUSED]
FINAL = "model.norm.weight"


def covariance(size, seed=0):
    """Of a random stream, some of whose directions carry far more than others."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(3 * size, size)) * np.geomspace(3, 0.1, size) @ random.normal(size=(size, size))
    return x.T @ x * (size / np.square(x).sum())


def with_final_norm(folder, weight):
    tensors = {name: raw.view(np.float32) for name, raw in raw_tensors(folder).items()}
    tensors[FINAL] = np.asarray(weight, np.float32)
    save_tensors(folder, tensors)
    return folder


def rotated(folder, out):
    """(the source, its rotation, the folder of the rotated model)"""
    source = HFSource(folder)
    rotation = rotation_of(source, covariance(source.architecture.hidden_size))
    write_rotated(source, rotation, out, {})
    return source, rotation, out


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_model(name, tmp_path):
    """A tied head is exact where the channels that share axes have one final weight; every third has another."""
    folder = contract.make(tmp_path / "t", name)
    architecture, tied = from_hf(folder), from_hf(folder).tied_embeddings
    size = architecture.hidden_size
    if tied:
        with_final_norm(folder, [1.5 if i % 3 else 0.25 for i in range(size)])
    source, rotation, out = rotated(folder, tmp_path / "s")
    assert rotation.mixed == (32 if tied else size)
    assert from_hf(out) == architecture
    before, found = (logits(loaded(made), TOKENS) for made in (folder, out))
    assert before.std() > 0.1
    assert np.abs(found - before).max() < LOGITS_PICO_FP32
    written = HFSource(out)
    norm = written.read("layers.0.input_norm.weight", (np.arange(size),)).view(np.float32)
    np.testing.assert_array_equal(norm, np.full(size, length(source, "layers.0.input_norm.weight"), np.float32))
    for matrix in ("embedding.weight", "layers.0.o.weight"):  # no tensor is as it was
        index = whole(architecture.shapes()[matrix])
        assert not np.isclose(written.read(matrix, index).view("f4"), source.read(matrix, index).view("f4")).all()


def test_axes_come_in_the_order_of_their_energy(tmp_path):
    source = HFSource(pico_llama(tmp_path / "t"))
    sums = covariance(48)
    rotation = rotation_of(source, sums)
    np.testing.assert_allclose(rotation.basis.T @ rotation.basis, np.eye(48), atol=1e-12)
    np.testing.assert_allclose(rotation.basis.T @ sums @ rotation.basis, np.diag(rotation.energy * 48), atol=1e-10)
    assert (np.diff(rotation.energy) <= 0).all()
    assert rotation.kept(48) == pytest.approx(1)
    assert rotation.kept(12) > 0.6 > 12 / 48  # far more than any dozen of these channels has
    largest = np.abs(rotation.basis).argmax(0)
    assert (rotation.basis[largest, np.arange(48)] > 0).all()


def test_channels_with_another_final_weight_keep_their_own_axes(tmp_path):
    """The rotated final norm has the diagonal of Q^T w Q, by hand."""
    weight = np.where(np.arange(48) % 4 == 0, -2.0, 1.0) + np.linspace(-0.05, 0.05, 48)
    folder = with_final_norm(pico_llama(tmp_path / "t", tie_word_embeddings=True), weight)
    _, rotation, out = rotated(folder, tmp_path / "s")
    assert rotation.mixed == 36
    own = rotation.basis[::4]  # the rows of the channels that keep their axes: a single 1 each
    assert (np.sort(own, axis=1)[:, -2:] == [0, 1]).all()
    found = raw_tensors(out)[FINAL].view(np.float32)
    basis = rotation.basis
    np.testing.assert_allclose(found, np.diag(basis.T @ np.diag(weight) @ basis), rtol=0, atol=ROTATED_FP32)


def test_final_weights_on_both_sides_of_0(tmp_path):
    """Their mean is 0, and no channel is near it."""
    weight = [1.0 if i % 2 else -1.0 for i in range(48)]
    source = HFSource(with_final_norm(pico_llama(tmp_path / "t", tie_word_embeddings=True), weight))
    assert rotation_of(source, covariance(48)).mixed == 24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_channels_by_hand(tmp_path, dtype):
    """The student of a rotated Llama with biases, in float64 by Hugging Face's names, rounded once."""
    folder = pico_llama(tmp_path / "t", dtype=dtype, attention_bias=True, mlp_bias=True)
    source = HFSource(folder)
    rotation = rotation_of(source, covariance(48))
    plan = PrunePlan(source.architecture, source.architecture.replace(hidden_size=40), {"hidden": list(range(40))})
    prune(Rotated(source, rotation), plan, tmp_path / "s")
    basis, before, found = rotation.basis[:, :40], numbers(folder, dtype), numbers(tmp_path / "s", dtype)
    for name, tensor in before.items():
        words = name.split(".")
        layer = ".".join(words[:3])
        reads = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
        if tensor.ndim == 1 and "norm" in name:
            expected = np.full(40, np.sqrt(np.square(tensor).mean()))
        elif name == "model.embed_tokens.weight":
            expected = tensor @ basis
        elif name == "lm_head.weight":
            expected = tensor * unit_length(before[FINAL]) @ basis
        elif words[-2] in ("o_proj", "down_proj"):
            expected = basis.T @ tensor
        elif tensor.ndim == 1:
            expected = tensor
        else:
            expected = tensor * unit_length(before[f"{layer}.{reads[words[3]]}.weight"]) @ basis
        unit = 2.0**-8 if dtype == "bfloat16" else ROTATED_FP32
        np.testing.assert_allclose(found[name], expected, rtol=unit, atol=1e-6, err_msg=name)


def length(source, name):
    """The root mean square of a norm's weights."""
    weight = source.read(name, (np.arange(source.architecture.hidden_size),)).view(np.float32).astype(np.float64)
    return np.sqrt(np.square(weight).mean())


def unit_length(weight):
    return weight / np.sqrt(np.square(weight).mean())


def numbers(folder, dtype):
    import ml_dtypes

    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    return {name: raw.view(kind).astype(np.float64) for name, raw in raw_tensors(folder).items()}


@pytest.mark.parametrize(
    ("family", "words"), [(pico_nemotron, "this model has LayerNorm"), (pico_gemma2, "norms behind attention and MLP")]
)
def test_models_that_cannot_be_rotated(family, words, tmp_path):
    source = HFSource(family(tmp_path / "t"))
    for refused in (lambda: check_rotation(source.architecture), lambda: rotation_of(source, covariance(48))):
        with pytest.raises(InputError, match=words):
            refused()


@pytest.mark.parametrize(("sums", "words"), [(np.eye(40), "the model has 48"), (np.full((48, 48), np.nan), "finite")])
def test_a_covariance_that_does_not_serve(sums, words, tmp_path):
    with pytest.raises(InputError, match=words):
        rotation_of(HFSource(pico_qwen3(tmp_path / "t")), sums)
