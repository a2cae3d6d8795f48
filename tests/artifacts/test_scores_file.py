"""Scores: files give back the numbers, damaged ones are refused."""

import numpy as np
import pytest
from test_architecture import smollm2

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.errors import InputError

ARCHITECTURE = smollm2(num_layers=3, hidden_size=6, ffn_hidden_size=8, head_dim=2, vocab_size=11)


def scores():
    generator = np.random.default_rng(0)
    tensors = {n: generator.random(s, np.float32) for n, s in expected_shapes(ARCHITECTURE).items()}
    return Scores(
        ARCHITECTURE, tensors, samples=4, tokens=64, model_digest="ab", layout={"tp": 3},
        depth={"loss": {(0, 1): 2.5, (1, 2): 3.0}}, states={"ffn/l2,mean/sum_of_squares": np.ones((3, 2, 8))},
    )  # fmt: skip


def test_round_trip(tmp_path):
    made = scores()
    made.save(tmp_path / "s.safetensors")
    loaded = Scores.load(tmp_path / "s.safetensors")
    assert loaded.architecture == ARCHITECTURE
    assert loaded.digest == made.digest
    assert (loaded.depth, loaded.layout, loaded.samples, loaded.tokens) == (made.depth, {"tp": 3}, 4, 64)
    for name, array in made.tensors.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], array)
    np.testing.assert_array_equal(
        loaded.states["ffn/l2,mean/sum_of_squares"], made.states["ffn/l2,mean/sum_of_squares"]
    )


def test_digest_is_of_numbers_not_of_layout():
    a, b = scores(), scores()
    b.layout, b.notes = {"tp": 1}, {"x": 1}
    assert a.digest == b.digest
    b.tensors["ffn"][1, 2] += 1e-6
    assert a.digest != b.digest


def test_method_is_kept_and_part_of_the_identity(tmp_path):
    made = scores()
    before = made.digest
    made.method = "taylor"
    made.save(tmp_path / "s.safetensors")
    assert Scores.load(tmp_path / "s.safetensors").method == "taylor"
    assert made.digest != before


def test_shapes_of_a_mixture():
    sizes = {"num_moe_experts": 4, "moe_ffn_hidden_size": 5, "moe_layer_freq": (0, 1, 1)}
    mixture = ARCHITECTURE.replace(**sizes, moe_shared_expert_intermediate_size=7)
    assert set(expected_shapes(mixture)) - set(expected_shapes(ARCHITECTURE)) == {
        "experts", "expert_ffn", "shared_expert_ffn",
    }  # fmt: skip
    made = Scores(mixture, {"expert_ffn": np.zeros((3, 4, 8), np.float32)})
    with pytest.raises(InputError, match=r"'expert_ffn' is \(3, 4, 8\), the architecture says \(3, 4, 5\)"):
        made.check()
    assert "shared_expert_ffn" not in expected_shapes(ARCHITECTURE.replace(**sizes))


def test_absent_axis():
    with pytest.raises(InputError, match="no 'hiden'; did you mean 'hidden'"):
        scores()["hiden"]
    assert "ffn" in scores()
    assert "vocab" not in scores()


def test_damaged(tmp_path):
    file = tmp_path / "s.safetensors"
    with pytest.raises(InputError, match="do not exist"):
        Scores.load(file)
    scores().save(file)
    whole = file.read_bytes()
    for text in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        file.write_bytes(text)
        with pytest.raises(InputError, match="no file of scores"):
            Scores.load(file)
    wrong = scores()
    wrong.tensors["heads"] = np.zeros((3, 8), np.float32)
    wrong.save(file)
    with pytest.raises(InputError, match=r"'heads' is \(3, 8\), the architecture says \(3, 9\)"):
        Scores.load(file)
    wrong = scores()
    wrong.tensors["ffn"][0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):  # reading: test_scores_not_finite.py
        wrong.save(file)
