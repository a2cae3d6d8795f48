"""A precision becomes Megatron's fields where Transformer Engine is, over made-up machines; else the emulation's."""

import dataclasses
import types

import pytest
import torch

import nemo_minitron.backend as backend
from nemo_minitron.backend import precision as module
from nemo_minitron.backend import versions
from nemo_minitron.backend.precision import apply, forward_fields, megatron_fields, trained_fields, unsupported
from nemo_minitron.errors import InputError
from nemo_minitron.precisions import FP8

HOPPER, ADA, AMPERE, BLACKWELL, LATER = (9, 0), (8, 9), (8, 0), (10, 0), (12, 0)


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes this look like a GPU machine with Transformer Engine."""

    def looks(capability=HOPPER, cuda="12.9", engine="2.9.0"):
        monkeypatch.setattr(backend, "setup", lambda: backend.Switches(cpu=False, reference=False))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(versions, "installed", lambda name: engine)

    return looks


def test_fields_are_megatrons():
    """Every field is one of Megatron's config, with a value that it takes."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer import TransformerConfig

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for name in FP8:
        fields = megatron_fields(name)
        assert set(fields) - {"fp8_param_gather"} <= known  # the optimizer's and NeMo's
        assert Fp8Recipe(fields["fp8_recipe"])
    assert megatron_fields("fp8-delayed")["fp8_amax_history_len"] == 1024
    assert [megatron_fields(name)["fp8"] for name in FP8] == ["hybrid", "hybrid", "e4m3"]
    assert megatron_fields("bf16") == megatron_fields("fp32") == {}


@pytest.mark.parametrize(
    ("name", "capability", "cuda", "engine", "words"),
    [
        ("fp8-current", AMPERE, (13, 0), "2.9", "FP8 needs compute capability 8.9, the device has 8.0"),
        ("fp8-blockwise", ADA, (13, 0), "2.9", "blocks need compute capability 9.0 to 11.x, the device has 8.9"),
        ("fp8-blockwise", BLACKWELL, (13, 0), "2.8", "blocks need compute capability 9.0 to 9.x, the device has 10.0"),
        ("fp8-blockwise", BLACKWELL, (13, 0), "2.9.0+70f5366", ""),
        ("fp8-blockwise", LATER, (13, 0), "2.9", "blocks need compute capability 9.0 to 11.x"),
        ("fp8-blockwise", HOPPER, (12, 8), "2.9", "blocks need CUDA 12.9, torch was built with 12.8"),
        ("fp8-blockwise", HOPPER, (12, 9), "2.2", "it needs Transformer Engine 2.3, 2.2 is installed"),
        ("fp8-current", HOPPER, (12, 9), "2.1", "it needs Transformer Engine 2.2"),
        ("fp8-delayed", ADA, (12, 1), "2.0", ""),
        ("fp8-blockwise", HOPPER, (12, 9), "2.9", ""),
        ("bf16", AMPERE, (11, 8), "1.0", ""),
    ],
)
def test_what_a_device_cannot_do(name, capability, cuda, engine, words):
    why = unsupported(name, capability, cuda, engine)
    assert why.startswith(words) if words else why == ""


def test_with_transformer_engine_the_config_gets_them(gpu):
    gpu()
    config = types.SimpleNamespace()
    apply(config, "fp8-current")
    assert vars(config) == {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param_gather": False}
    assert trained_fields("fp8-delayed")["fp8_recipe"] == "delayed"
    with pytest.raises(InputError, match=r"'fp8-delayed' moves its scales in training.*nearest legal is 'fp8-current'"):
        forward_fields("fp8-delayed")
    gpu(cuda="12.6")
    with pytest.raises(InputError, match=r"'fp8-blockwise' cannot run here: blocks need CUDA 12.9.*'fp8-delayed'"):
        apply(config, "fp8-blockwise", training=True)
    gpu(AMPERE)
    with pytest.raises(InputError, match=r"cannot run here: FP8 needs compute capability 8.9.*nearest legal is 'bf16'"):
        apply(config, "fp8-current")


def test_without_it_they_stay_unset():
    config = types.SimpleNamespace()
    for name, recipe in FP8.items():
        apply(config, name)
        assert vars(config) == {module.EMULATED: recipe}
    apply(plain := types.SimpleNamespace(), "bf16")
    assert vars(plain) == {}
    with pytest.raises(InputError, match="precision 'fp8' is unknown here"):
        apply(plain, "fp8")
