"""The commands that serve a Hugging Face folder in vLLM and TensorRT-LLM, in bf16 or FP8."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from nemo_minitron.errors import InputError, nearest
from nemo_minitron.families import check_stage

PRECISIONS = ("bf16", "fp8")
QUANTISED = "-fp8"  # ending of the folder that Model Optimizer quantises for TensorRT-LLM, beside the model's own
HF_PTQ = "examples/llm_ptq/hf_ptq.py"  # from github.com/NVIDIA/Model-Optimizer; its wheel lacks it


def serving_commands(model: str | Path, *, precision: str = "bf16", tp: int = 1) -> dict[str, list[str]]:
    """Engine -> its commands, in order; a pruned student is served like any model of its family.

    vLLM quantises to FP8 while it loads, with scales of each batch; TensorRT-LLM reads a folder with calibrated scales.
    Raises InputError if `model` is no model, the precision is unknown, or `tp` does not divide the heads.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision '{precision}' is unknown to the engines; {nearest(precision, PRECISIONS)}")
    if not str(model).isprintable():
        raise InputError(f"'{model}' has characters that a command line cannot show; give the folder another name")
    architecture = check_stage(model, "serving")
    if precision == "fp8" and architecture.num_moe_experts and architecture.mlp_bias:
        raise InputError("no engine is known to serve experts with biases in fp8; legal is bf16")
    heads = math.gcd(architecture.num_attention_heads, architecture.mamba_num_heads or 0)
    if tp < 1 or heads % tp:
        legal = [size for size in range(1, heads + 1) if heads % size == 0]
        both = f" and {architecture.mamba_num_heads} Mamba heads" if architecture.mamba_num_heads else ""
        raise InputError(
            f"tp={tp} does not divide {architecture.num_attention_heads} heads{both}; the nearest legal tp is "
            f"{min(legal, key=lambda n: abs(n - tp))}"
        )
    start = "./" if str(model).startswith("-") else ""  # an engine would read the name as an option
    folder, quantised = (shlex.quote(f"{start}{model}{end}") for end in ("", QUANTISED))
    vllm = f"vllm serve {folder} --dtype bfloat16 --tensor-parallel-size {tp}"
    if precision == "bf16":
        return {"vllm": [vllm], "tensorrt_llm": [f"trtllm-serve {folder} --tp_size {tp}"]}
    calibrate = f"python {HF_PTQ} --pyt_ckpt_path {folder} --qformat fp8 --export_path {quantised}"
    return {
        "vllm": [f"{vllm} --quantization fp8"],
        "tensorrt_llm": [calibrate, f"trtllm-serve {quantised} --tp_size {tp}"],
    }
