"""A teacher whose weights hold NaN or an infinity makes no student; what a cut leaves behind does not matter."""

import numpy as np
import pytest
from pico import pico_llama, raw_tensors

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune

UP, DOWN = "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
BITS = {"float32": np.uint32(0xFF800000), "bfloat16": np.uint16(0x7FC1), "float16": np.uint16(0x7C00)}


def spoilt(folder, dtype, name, place):
    """A teacher with one number that is none."""
    import torch
    from safetensors.torch import load_file, save_file

    pico_llama(folder, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    kind = torch.int32 if dtype == "float32" else torch.int16
    signed = np.array(BITS[dtype]).view(f"i{BITS[dtype].itemsize}").item()
    tensors[name].view(kind)[place] = signed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plans(source):
    keep = {layer: list(range(1, 96)) for layer in range(6)}
    return {
        "depth": PrunePlan(source=source, target=source.replace(num_layers=2), keep={"layers": [2, 4]}),
        "width": PrunePlan(source=source, target=source.replace(ffn_hidden_size=95), keep={"ffn": keep}),
    }


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("plan", ["depth", "width"])
@pytest.mark.parametrize(("name", "place"), [(UP, (7, 3)), (DOWN, (3, 7))])
def test_it_is_named_and_nothing_is_left(tmp_path, dtype, plan, name, place):
    teacher = spoilt(tmp_path / "teacher", dtype, name, place)
    local = name.split(".")[-2].removesuffix("_proj")
    with pytest.raises(InputError, match=rf"'layers.2.{local}.weight' hold a number that is not finite"):
        prune(teacher, plans(from_hf(teacher))[plan], tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(("name", "place"), [(UP, (0, 3)), (DOWN, (3, 0))])
def test_what_is_cut_off_does_not_matter(tmp_path, name, place):
    teacher = spoilt(tmp_path / "teacher", "bfloat16", name, place)
    prune(teacher, plans(from_hf(teacher))["width"], tmp_path / "student")
    assert not any((bits & 0x7F80 == 0x7F80).any() for bits in raw_tensors(tmp_path / "student").values())


def test_what_is_solved_and_overflows_the_stored_dtype(tmp_path):
    """fp32 has room for 1e6, fp16 has not: an infinity would be written."""
    teacher = pico_llama(tmp_path / "teacher", dtype="float16")
    plan = plans(from_hf(teacher))["width"]
    solved = Compensation(plan.digest, {"layers.0.down.weight": np.full((48, 95), 1e6, np.float32)})
    with pytest.raises(InputError, match=r"'layers.0.down.weight' hold a number that is not finite"):
        prune(teacher, plan, tmp_path / "student", compensation=solved)
    assert not (tmp_path / "student").exists()
