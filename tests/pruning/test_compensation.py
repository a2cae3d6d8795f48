"""Re-fitted tensors beside a plan: least squares, folded norms, the residual of pruned heads."""

import json
import threading

import numpy as np
import pytest
from pico import pico_gemma2, pico_gemma3_text, pico_llama, raw_tensors, save_tensors
from plans_by_hand import HIDDEN, slice_by_hand, whole_groups, width_and_depth
from tolerances import LOGITS_PICO_FP32, SOLVED_FP32

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.dtypes import as_numbers, as_stored
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.pruning.compensation import fold_norms, head_residual, solvable, solve
from nemo_minitron.pruning.student import Student
from nemo_minitron.sources.streams import Sink
from nemo_minitron.sources.tensors import whole

DOWN = "layers.1.down.weight"  # of source layer 2


def inputs(channels, tokens=300, seed=0):
    """Correlated inputs [tokens, channels], so that what stays knows of what goes."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(tokens, 7)) @ generator.normal(size=(7, channels)) + generator.normal(
        scale=0.1, size=(tokens, channels)
    )


def floats(folder):
    return {name: tensor.view(np.float32) for name, tensor in raw_tensors(folder).items()}


@pytest.fixture
def cut(tmp_path):
    """A teacher, its source, and a plan that cuts layers, hidden, ffn and heads."""
    teacher = pico_llama(tmp_path / "t")
    return teacher, HFSource(teacher), width_and_depth(from_hf(teacher))


# -- least squares -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "key"), [(DOWN, "ffn"), ("layers.2.o.weight", "heads")])
def test_least_squares_by_hand(cut, name, key):
    """The minimum of the damped problem, written as one ordinary least squares with rows for the damping."""
    teacher, source, plan = cut
    layer = plan.kept_layers[int(name.split(".")[1])]
    local = {"ffn": "mlp.down_proj", "heads": "self_attn.o_proj"}[key]
    weights = floats(teacher)[f"model.layers.{layer}.{local}.weight"].astype(np.float64)[HIDDEN]
    kept = np.array(plan.keep[key][layer])
    kept = kept if key == "ffn" else (kept[:, None] * 8 + np.arange(8)).ravel()
    x, ridge = inputs(weights.shape[1]), 0.03
    damping = np.sqrt(ridge * np.mean(np.sum(x[:, kept] ** 2, axis=0)))
    rows = np.concatenate([x[:, kept], damping * np.eye(len(kept))])
    wanted = np.concatenate([x @ weights.T, damping * weights[:, kept].T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = solve(source, plan, name, x.T @ x, ridge)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=SOLVED_FP32)
    plain, solved = (np.square(x @ weights.T - x[:, kept] @ w.T).sum() for w in (weights[:, kept], found))
    assert solved < plain / 4  # the inputs are correlated: much of what went can be said by what stays


def test_what_is_solved(cut):
    _, source, plan = cut
    assert dict(solvable(plan)) == {
        f"layers.{new}.{tensor}.weight": f"layers.{old}.{tensor}.weight"
        for new, old in enumerate(plan.kept_layers)
        for tensor in ("o", "down")
    }
    assert {name.split(".")[2] for name, _ in solvable(whole_groups(source.architecture))} == {"o"}
    assert not list(solvable(PrunePlan(source=plan.source, target=plan.source, keep={})))


def test_nothing_changes_where_nothing_spoke(cut):
    """Neurons that were always 0 go, or all were: the plain slice, bit for bit; so does a ridge without end."""
    _, source, plan = cut
    plain = source.read(*_slice(plan, DOWN)).view(np.float32)
    x = inputs(96)
    silent = x.copy()
    silent[:, np.setdiff1d(np.arange(96), plan.keep["ffn"][2])] = 0
    for gram in (silent.T @ silent, np.zeros((96, 96))):
        np.testing.assert_array_equal(solve(source, plan, DOWN, gram), plain)
    np.testing.assert_allclose(solve(source, plan, DOWN, x.T @ x, ridge=1e12), plain, rtol=0, atol=1e-9)
    assert np.abs(solve(source, plan, DOWN, x.T @ x) - plain).max() > 1e-3


def _slice(plan, name):
    from nemo_minitron.pruning import student_index

    return student_index(plan, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0}, "above 0"),
        ({"ridge": np.inf}, "finite"),
        ({"gram": np.eye(95)}, "96 channels"),
        ({"gram": np.diag([np.nan] * 96)}, "not finite"),
    ],
)
def test_what_cannot_be_solved(cut, options, message):
    _, source, plan = cut
    with pytest.raises(InputError, match=message):
        solve(source, plan, DOWN, **{"gram": np.eye(96), **options})


# -- into the student ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_takes_the_place_of_the_slices(tmp_path, dtype):
    """In the teacher's dtype, rounded as torch rounds; every other tensor is the plain cut's, bit for bit."""
    import torch

    teacher = pico_llama(tmp_path / "t", dtype=dtype)
    plan = width_and_depth(from_hf(teacher))
    values = np.random.default_rng(0).normal(size=(41, 50)).astype(np.float32)
    Compensation(plan.digest, {DOWN: values}, {"ridge": 0.01}).save(tmp_path / "c.safetensors")
    found = raw_tensors(prune(teacher, plan, tmp_path / "s", compensation=tmp_path / "c.safetensors"))
    expected = slice_by_hand(raw_tensors(teacher), plan)
    rounded = torch.from_numpy(values).to(getattr(torch, dtype))
    expected["model.layers.1.mlp.down_proj.weight"] = (
        rounded.view(torch.int32 if dtype == "float32" else torch.int16)
        .numpy()
        .view(np.uint32 if dtype == "float32" else np.uint16)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)
    note = json.loads((tmp_path / "s" / "minitron_compensation.json").read_text())
    assert note == {"tensors": [DOWN], "ridge": 0.01}
    again = prune(tmp_path / "s", PrunePlan(source=plan.target, target=plan.target, keep={}), tmp_path / "s2")
    assert not (again / "minitron_compensation.json").exists()


def test_a_student_is_a_source(cut, tmp_path):
    """Blocks that are read by the student's own positions are those of the tensor, which is what is written."""
    _, source, plan = cut
    values = np.random.default_rng(0).normal(size=(41, 50)).astype(np.float32)
    student = Student(source, plan, Compensation(plan.digest, {DOWN: values}))
    generator = np.random.default_rng(1)
    for name, shape in plan.target.shapes().items():
        entire = student.read(name, whole(shape))
        written = tmp_path / name
        with open(written, "wb", buffering=0) as stream:
            student.put(name, Sink(stream.fileno(), 0, threading.Lock(), student.dtype(name), name))
        assert written.read_bytes() == entire.tobytes()
        index = tuple(np.flatnonzero(generator.random(n) < 0.5) for n in shape)
        np.testing.assert_array_equal(student.read(name, index), entire[np.ix_(*index)], err_msg=name, strict=True)
    np.testing.assert_array_equal(student.read(DOWN, whole((41, 50))).view(np.float32), values)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_numbers_and_bits(dtype):
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    raw = as_stored(values, dtype)
    np.testing.assert_array_equal(as_stored(as_numbers(raw, dtype).astype(np.float32), dtype), raw, strict=True)
    np.testing.assert_allclose(as_numbers(raw, dtype), values, rtol=2.0**-8)


# -- the file ------------------------------------------------------------------------------------------
def test_what_a_file_may_not_be(tmp_path, cut):
    from safetensors.numpy import save_file

    teacher, _, plan = cut
    path, header = tmp_path / "c", {"version": 1, "plan": plan.digest, "notes": {}}

    def refused(message, arrays, values):
        save_file(arrays, path, metadata={"compensation": json.dumps(values)})
        with pytest.raises(InputError, match=message) as caught:
            prune(teacher, plan, tmp_path / "s", compensation=path)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "s").exists()

    good = np.zeros((41, 50), np.float32)
    refused("made for another plan", {DOWN: good}, header | {"plan": "x"})
    refused(r"is \(41, 49\), the student's is \(41, 50\)", {DOWN: good[:, 1:].copy()}, header)
    refused("the student's is not there", {"layers.3.down.weight": good}, header)
    refused("is not a compensation", {DOWN: good.astype(np.float64)}, header)
    refused("is not a compensation", {DOWN: good}, header | {"version": 3})
    refused("is not a compensation", {DOWN: good}, {})
    refused("not finite", {DOWN: good * np.nan}, header)
    path.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="is not a compensation"):
        Compensation.load(path)
    with pytest.raises(InputError, match="does not exist"):
        Compensation.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="not finite"):
        Compensation(plan.digest, {DOWN: good + np.inf}).save(path)


# -- folded norms --------------------------------------------------------------------------------------
def zero_channels(teacher):
    """Nothing is ever written to a third of the residual stream's channels."""
    gone = np.arange(0, 48, 3)
    tensors = floats(teacher)
    for name in tensors:
        if "embed_tokens" in name:
            tensors[name][:, gone] = 0
        if "o_proj" in name or "down_proj" in name:
            tensors[name][gone] = 0
    save_tensors(teacher, tensors)
    return np.setdiff1d(np.arange(48), gone).tolist()


@pytest.mark.parametrize(
    ("family", "options", "count"),
    [
        (pico_llama, {}, 13), (pico_gemma3_text, {"tie_word_embeddings": True}, 25),
        (pico_gemma2, {"tie_word_embeddings": False}, 25),
    ],
)  # fmt: skip
def test_folded_norms_make_zero_channels_exact(tmp_path, family, options, count):
    """Without the fold the logits are others, with it they are the teacher's (but for epsilon, made small here)."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = family(tmp_path / "t", rms_norm_eps=1e-12, **options)
    kept = zero_channels(teacher)
    source = from_hf(teacher)
    plan = PrunePlan(source=source, target=source.replace(hidden_size=32), keep={"hidden": kept})
    folded = Compensation(plan.digest, fold_norms(HFSource(teacher), plan))
    assert len(folded.tensors) == count
    prune(teacher, plan, tmp_path / "plain")
    prune(teacher, plan, tmp_path / "folded", compensation=folded)
    tokens = torch.arange(3, 131)[None] * 13 % 509
    with torch.no_grad():
        before, plain, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in ("t", "plain", "folded")
        )
    assert (plain - before).abs().max() > 0.01
    torch.testing.assert_close(after, before, rtol=0, atol=LOGITS_PICO_FP32)


def test_what_cannot_be_folded(cut):
    _, source, _ = cut
    with pytest.raises(InputError, match="no hidden channels"):
        fold_norms(source, whole_groups(source.architecture))
    layernorm = source.architecture.replace(normalization="layernorm")
    with pytest.raises(InputError, match="exact for RMSNorm alone"):
        fold_norms(source, width_and_depth(layernorm))


# -- head residual -------------------------------------------------------------------------------------
def plan_of_heads(source, heads, groups=None):
    target = source.replace(num_attention_heads=len(heads), num_query_groups=len(groups or range(2)))
    keep = {"heads": dict.fromkeys(range(6), heads)}
    if groups:
        keep["query_groups"] = dict.fromkeys(range(6), groups)
    return PrunePlan(source=source, target=target, keep=keep)


def test_head_residual_by_hand(tmp_path):
    """Groups of four heads, three stay: the least of those takes its pruned partner's difference; biases as well."""
    teacher = pico_llama(
        tmp_path / "t", num_attention_heads=8, num_key_value_heads=2, attention_bias=True, num_hidden_layers=6
    )
    scores = np.tile([4.0, 1, 3, 2, 1, 2, 4, 3], (6, 1))  # ranked 0 2 3 | 1 and 6 7 5 | 4
    plan = plan_of_heads(from_hf(teacher), [0, 2, 3, 5, 6, 7])
    changed = head_residual(HFSource(teacher), plan, scores)
    assert set(changed) == {f"layers.{n}.q.{part}" for n in range(6) for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        old = floats(teacher)[f"model.layers.4.self_attn.q_proj.{part}"].astype(np.float64).reshape(8, 8, -1)
        expected = old[[0, 2, 3, 5, 6, 7]]
        expected[2] += old[3] - old[1]
        expected[3] += old[5] - old[4]
        found = changed[f"layers.4.q.{part}"].reshape(6, 8, -1)
        np.testing.assert_array_equal(found, expected.astype(np.float32), err_msg=part)


def test_head_residual_of_half_of_the_heads_of_their_own(tmp_path):
    """MHA: the layer is one group, keys and values follow; with the other sign a head becomes its partner."""
    teacher = pico_llama(tmp_path / "t", num_attention_heads=6, num_key_value_heads=6)
    scores = np.tile([6.0, 5, 4, 3, 2, 1], (6, 1))
    plan = plan_of_heads(from_hf(teacher), [0, 1, 2], [0, 1, 2])
    changed = head_residual(HFSource(teacher), plan, scores, "laco")
    assert {name.split(".", 2)[2] for name in changed} == {"q.weight", "k.weight", "v.weight"}
    old = floats(teacher)["model.layers.0.self_attn.k_proj.weight"].reshape(6, 8, 48)
    np.testing.assert_allclose(changed["layers.0.k.weight"].reshape(3, 8, 48), old[[5, 4, 3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([0, 4], {}, "1 of 4 heads stay .* nearest legal number is 2"),
        (list(range(8)), {}, "4 of 4 heads stay .* nearest legal number is 3"),
        ([0, 1, 4, 5], {"sign": "minus"}, "legal are paper and laco"),
        ([0, 1, 4, 5], {"scores": np.zeros((6, 7))}, r"the model has \(6, 8\)"),
    ],
)
def test_head_residuals_that_are_refused(tmp_path, heads, options, message):
    teacher = pico_llama(tmp_path / "t", num_attention_heads=8, num_key_value_heads=2)
    plan = plan_of_heads(from_hf(teacher), heads)
    with pytest.raises(InputError, match=message):
        head_residual(HFSource(teacher), plan, **{"scores": np.zeros((6, 8)), **options})
