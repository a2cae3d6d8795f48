"""setup(): light, once, only where it is needed; CUDA calls, config fields and the mends after an import."""

import os
import subprocess
import sys
import textwrap
import types

import pytest

import nemo_minitron.backend as backend
from nemo_minitron.backend import versions
from nemo_minitron.errors import InputError


def python(code, **options):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_is_light_and_setup_leaves_nemo_alone():
    python("""
        import sys
        import nemo_minitron.backend as backend
        assert not {"torch", "megatron", "nemo"} & set(sys.modules)
        backend.setup()
        assert "megatron.core" in sys.modules
        assert not {"nemo", "lightning", "nemo_run"} & set(sys.modules)
    """)


def test_setup_is_idempotent():
    import torch
    from megatron.core.model_parallel_config import ModelParallelConfig

    first = backend.setup()
    before = (ModelParallelConfig.__post_init__, torch.cuda.current_device, len(sys.meta_path))
    assert backend.setup() is first
    assert (ModelParallelConfig.__post_init__, torch.cuda.current_device, len(sys.meta_path)) == before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["RuntimeError('empty meta package')", "OSError('libcuda.so.1')", "AssertionError()"])
def test_an_engine_that_does_not_import_is_hidden_from_megatron(tmp_path, how):
    """Megatron takes an ImportError alone for a no; what Transformer Engine 2.9 raises is each of these."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(f"raise {how}")
    for name in ("apex", "amp_C"):  # as in NVIDIA's containers: fused optimizers that want CUDA tensors
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    code = """
        import torch
        import nemo_minitron.backend as backend
        assert backend.setup().reference
        from megatron.core import fp8_utils
        from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
        assert not fp8_utils.HAVE_TE
        assert USING_PYTORCH_OPTIMIZER or torch.cuda.is_available()
        import os
        assert "TORCH_CUDA_ARCH_LIST" in os.environ or torch.cuda.is_available()
    """
    python(code, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"megatron-core": "0.14.0"}, r"megatron-core 0\.14\.0 is installed; >=0\.15,<0\.20 is supported"),
        ({"megatron-core": "0.20.0"}, r"megatron-core 0\.20\.0 is installed; >=0\.15,<0\.20 is supported"),
        (
            {"megatron-core": None},
            r"megatron-core is not installed here; .* a host: .*nemo_minitron\[nemo\]",
        ),
        ({"nemo_toolkit": "3.0.0"}, r"nemo_toolkit 3\.0\.0 is installed; >=2\.6,<3 is supported"),
        ({"nemo_toolkit": "2.7.3", "megatron-core": "0.17.0"}, r"0\.17\.0 is installed beside nemo_toolkit; .*<0\.17"),
        ({"megatron-bridge": "0.6.2", "megatron-core": "0.16.1"}, r"is installed beside megatron-bridge; >=0\.17"),
        ({"megatron-bridge": "0.3.1", "megatron-core": "0.17.0"}, r"megatron-bridge 0\.3\.1 is installed; >=0\.6"),
    ],
)
def test_versions_that_are_not_supported_are_refused(monkeypatch, found, words):
    monkeypatch.setattr(versions, "installed", ({"megatron-core": "0.15.3"} | found).get)
    with pytest.raises(InputError, match=words):
        versions.check()


@pytest.mark.parametrize(
    "found",
    [*({"megatron-core": number} for number in ("0.15.0", "0.16.0rc1", "0.16.1", "0.17.0", "0.19.2")),
     {"megatron-core": "0.16.1", "nemo_toolkit": "2.7.3"}, {"megatron-core": "0.19.2", "megatron-bridge": "0.6.2"}],
)  # fmt: skip
def test_versions_that_are_supported_pass(monkeypatch, found):
    monkeypatch.setattr(versions, "installed", found.get)
    versions.check()


def test_a_replacement_needs_its_target():
    with pytest.raises(InputError, match="no_such_name"):
        versions.replace(types.ModuleType("some.module"), "no_such_name", None)


# -- CUDA calls --------------------------------------------------------------------------------------------
@pytest.fixture
def no_cuda():
    import torch

    if not backend.setup().cpu:
        pytest.skip("this machine has CUDA")
    return torch


@pytest.mark.parametrize(
    "call",
    [
        lambda torch: torch.ones(3, device="cuda"),
        lambda torch: torch.ones(3, device="cuda:1"),
        lambda torch: torch.ones(3, device=torch.device("cuda", 0)),
        lambda torch: torch.ones(3, device=0),
        lambda torch: torch.ones(3, device=torch.cuda.current_device()),
        lambda torch: torch.tensor([1.0, 1, 1], pin_memory=True).to("cuda", non_blocking=True),
        lambda torch: torch.ones(3).cuda(),
        lambda torch: torch.ones(3).cuda(torch.cuda.current_device(), non_blocking=True),
        lambda torch: torch.ones(3).pin_memory(),
        lambda torch: torch.ones(3).to(device="cuda", dtype=torch.float32),
        lambda torch: torch.ones(3).double().to(0).float(),
        lambda torch: torch.ones(1).new_ones(3, device="cuda"),
        lambda torch: torch.empty_like(torch.ones(3), device="cuda").fill_(1),
        lambda torch: torch.cuda.FloatTensor([1, 1, 1]),
    ],
)
def test_tensors_meant_for_cuda_lie_on_the_cpu(no_cuda, call):
    made = call(no_cuda)
    assert made.device.type == "cpu"
    assert made.tolist() == [1, 1, 1]


def test_what_is_not_meant_for_cuda_is_left_alone(no_cuda):
    torch = no_cuda
    assert torch.ones(3, device="meta").device.type == "meta"
    assert torch.ones(3).to(torch.bfloat16).dtype is torch.bfloat16
    assert torch.ones(3).type() == "torch.FloatTensor"  # only Megatron is told otherwise
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0


def test_megatron_clips_gradients(no_cuda):
    """It asserts that a gradient's type is 'torch.cuda.FloatTensor'."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = no_cuda.nn.Parameter(no_cuda.ones(4))
    parameter.grad = no_cuda.full((4,), 2.0)
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=4.0)
    assert parameter.grad.tolist() == pytest.approx([0.5] * 4, rel=1e-5)


def test_streams_and_events_are_done_at_once(no_cuda):
    cuda = no_cuda.cuda
    with cuda.stream(cuda.Stream()):
        event = cuda.current_stream().record_event(cuda.Event(enable_timing=True))
        cuda.current_stream().wait_stream(cuda.Stream())
    assert event.query()
    cuda.nvtx.range_push("a")
    cuda.nvtx.range_pop()
    assert cuda.max_memory_allocated() == 0


def test_random_states_of_cuda_are_those_of_the_cpu(no_cuda):
    torch = no_cuda
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)  # calls torch.cuda.manual_seed_all, which must not come back here
    assert torch.equal(torch.rand(3), first)


def test_megatrons_random_tracker_forks(no_cuda, caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch, tracker = no_cuda, CudaRNGStatesTracker()
    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    tracker.add("a", 11)
    with tracker.fork("a"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), wanted)  # outside goes on as if nothing had been
    torch.manual_seed(11)
    assert torch.equal(torch.rand(2), inside)
    assert "RNG state" not in caplog.text


def test_what_megatron_compiles_runs_as_it_is_written(no_cuda):
    from torch._dynamo.utils import counters

    compiled = no_cuda.compile(lambda x: x * 2)
    counters.clear()
    assert compiled(no_cuda.ones(2, device="cuda")).tolist() == [2, 2]
    assert not counters["frames"]


# -- config fields -----------------------------------------------------------------------------------------
def test_fields_that_need_transformer_engine_are_off():
    backend.setup()
    from megatron.core.transformer import TransformerConfig

    on = {"apply_rope_fusion": True, "persist_layer_norm": True, "gradient_accumulation_fusion": True,
          "moe_grouped_gemm": True, "fp8": "hybrid", "cross_entropy_fusion_impl": "te"}  # fmt: skip
    made = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, **on)
    assert {name: getattr(made, name) for name in on} == {
        **dict.fromkeys(on, False), "fp8": None, "cross_entropy_fusion_impl": "native"
    }  # fmt: skip


def test_deep_ep_becomes_the_all_to_all_dispatcher():
    if not backend.setup().cpu:
        pytest.skip("this machine has CUDA")
    from megatron.core.transformer import TransformerConfig

    on = {"num_moe_experts": 2, "moe_enable_deepep": True, "moe_shared_expert_overlap": True}
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    for given, wanted in {"flex": "alltoall", "alltoall": "alltoall", "allgather": "allgather"}.items():
        made = TransformerConfig(**sizes, **on, moe_token_dispatcher_type=given)
        assert made.moe_token_dispatcher_type == wanted
        assert not made.moe_enable_deepep
        assert not made.moe_shared_expert_overlap


def test_what_is_switched_off_depends_on_what_is_missing():
    from nemo_minitron.backend.configs import fields_off

    assert fields_off(cpu=False, reference=False) == {}
    on_gpu = fields_off(cpu=False, reference=True)
    assert "apply_rope_fusion" in on_gpu
    assert "bias_activation_fusion" not in on_gpu
    assert fields_off(cpu=True, reference=True)["bias_activation_fusion"] is False


# -- mends -------------------------------------------------------------------------------------------------
def test_a_module_is_mended_after_its_import(tmp_path, monkeypatch):
    from nemo_minitron.backend import mends

    (tmp_path / "mended_later.py").write_text("HAVE = False\ndef have(): return HAVE\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def mend(module):
        seen.append(module.__name__)
        versions.replace(module, "HAVE", True)

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(mends, "CPU", {"mended_later": mend})
    mends.watch(cpu=True, reference=False)
    assert seen == []
    import mended_later

    assert mended_later.have()
    mends.watch(cpu=True, reference=False)  # and at once where it is there already
    assert seen == ["mended_later"] * 2


def test_the_tables_name_modules_that_exist():
    import importlib.util
    from pathlib import Path

    from nemo_minitron.backend import mends
    from nemo_minitron.backend.versions import installed

    hosts = {"nemo.": "nemo_toolkit", "megatron.bridge.": "megatron-bridge", "megatron.core.": "megatron-core"}
    found = []
    for name in mends.CPU | mends.REFERENCE | mends.SCAN:
        if not installed(next(package for start, package in hosts.items() if name.startswith(start))):
            continue
        first, *rest = name.split(".")
        places = [Path(place, *rest) for place in importlib.util.find_spec(first).submodule_search_locations]
        assert any(place.is_dir() or place.with_suffix(".py").exists() for place in places), name
        found.append(name)
    assert found


@pytest.mark.nemo
@pytest.mark.slow
def test_nemo_is_mended():
    python("""
        import nemo_minitron.backend as backend
        backend.setup()
        from nemo.collections import llm
        from nemo.collections.llm.gpt.model import base
        from nemo.lightning.io import pl
        import torch
        assert base.HAVE_TE
        config = llm.LlamaConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
        assert not config.apply_rope_fusion
        assert config.__io__.apply_rope_fusion and config.__io__.persist_layer_norm  # what a context keeps
        spec = base.default_layer_spec(config)
        assert spec.submodules.self_attention.submodules.linear_qkv.__name__ == "LayerNormColumnParallelLinear"
        if not torch.cuda.is_available():
            assert pl._fix_tensors_device({"a": 1}) == {"a": 1}
    """)
