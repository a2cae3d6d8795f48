"""Magnitude and random scores: without a forward pass, with the axes that activations give."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama, pico_mixtral

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.errors import InputError
from nemo_minitron.importance import alternatives, magnitude, random_scores
from nemo_minitron.pruning import HFSource
from nemo_minitron.search import plan

sys.path.insert(0, str(Path(__file__).parents[1] / "artifacts"))
from test_criteria import MIXTURE


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "llama", tie_word_embeddings=True, attention_bias=True)
    pico_mixtral(folder / "mixtral", dtype="bfloat16")
    return folder


def tensors_of(folder):
    from safetensors.torch import load_file

    return {
        name: tensor.double().numpy()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def norm(*parts):
    """The L2 norm of units: each part is [units, ...]."""
    return np.sqrt(sum((part.reshape(len(part), -1) ** 2).sum(1) for part in parts))


def test_magnitude_of_a_dense_model_by_hand(folders, monkeypatch):
    monkeypatch.setattr(alternatives, "ROWS", 20)  # blocks that do not divide the tensors
    made, tensors = magnitude(HFSource(folders / "llama")), tensors_of(folders / "llama")
    t = {name.removeprefix("model.layers.4."): tensor for name, tensor in tensors.items()}
    heads = norm(t["self_attn.q_proj.weight"].reshape(6, -1), t["self_attn.q_proj.bias"].reshape(6, -1),
                 t["self_attn.o_proj.weight"].T.reshape(6, -1))  # fmt: skip
    pairs = [t[f"self_attn.{n}_proj.{part}"].reshape(3, -1) for n in "kv" for part in ("weight", "bias")]
    mlp = norm(t["mlp.gate_proj.weight"], t["mlp.up_proj.weight"], t["mlp.down_proj.weight"].T)
    expected = {"heads": heads, "query_groups": norm(*pairs, heads.reshape(3, 2)), "ffn": mlp}
    for name, values in expected.items():
        np.testing.assert_allclose(made[name][4], values, rtol=1e-6)
    into = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight", "tokens.weight")
    out = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "norm.weight")
    hidden = [x.T if name.endswith(into) else x for name, x in tensors.items() if name.endswith(into + out)]
    np.testing.assert_allclose(made["hidden"], norm(*hidden), rtol=1e-6)
    own = [x for name, x in tensors.items() if name.startswith("model.layers.4.")]
    np.testing.assert_allclose(made["layers"][4], np.sqrt(sum((x**2).sum() for x in own)), rtol=1e-6)


def test_magnitude_of_a_mixture_by_hand(folders):
    made, tensors = magnitude(HFSource(folders / "mixtral")), tensors_of(folders / "mixtral")
    prefix = "model.layers.2.block_sparse_moe."
    for expert in range(4):
        w1, w2, w3 = (tensors[f"{prefix}experts.{expert}.w{k}.weight"] for k in (1, 2, 3))
        np.testing.assert_allclose(made["expert_ffn"][2, expert], norm(w1, w3, w2.T), rtol=1e-6)
        whole = [x.reshape(1, -1) for x in (w1, w2, w3, tensors[f"{prefix}gate.weight"][expert])]
        np.testing.assert_allclose(made["experts"][2, expert], norm(*whole)[0], rtol=1e-6)
    assert "ffn" not in made  # every layer is a mixture


def test_random_scores_follow_their_seed():
    made, again, other = random_scores(MIXTURE), random_scores(MIXTURE, 0), random_scores(MIXTURE, 1)
    assert made.digest == again.digest != other.digest
    assert set(made.tensors) == set(expected_shapes(MIXTURE)) - {"norms", "stream", "stream_logs"}
    made.check()
    assert not made["experts"][0].any()
    assert made["experts"][1:].all()
    assert not made["ffn"][1:].any()
    assert made["ffn"][0].all()
    with pytest.raises(InputError, match="seed=-1 is not legal"):
        random_scores(MIXTURE, -1)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_they_make_plans_and_files(method, folders, tmp_path):
    source = HFSource(folders / "mixtral")
    made = magnitude(source) if method == "magnitude" else random_scores(source.architecture, 3)
    keep = {"hidden": 40, "experts": 3, "expert_ffn": 24, "layers": 4, "heads": 3}
    made.save(tmp_path / "s.safetensors")
    loaded = Scores.load(tmp_path / "s.safetensors")
    assert (loaded.method, loaded.digest) == (method, made.digest)
    assert plan(loaded, keep=keep).keep == plan(made, keep=keep).keep
    for wrong in (lambda: made.under("l2,mean"), lambda: made.merge(made)):
        with pytest.raises(InputError, match="statistics"):
            wrong()


def test_they_load_no_torch():
    code = "import sys; from nemo_minitron.importance import magnitude, random_scores; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
