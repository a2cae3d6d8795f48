"""A Hugging Face folder in a serving engine: the commands for vLLM and TensorRT-LLM, in bf16 or FP8."""

from __future__ import annotations

import shlex
from pathlib import Path

from nemo_minitron.errors import InputError, nearest
from nemo_minitron.families import from_hf

PRECISIONS = ("bf16", "fp8")
QUANTISED = "-fp8"  # TensorRT-LLM takes FP8 from a folder that Model Optimizer has quantised: beside the model's own
HF_PTQ = "examples/llm_ptq/hf_ptq.py"  # of github.com/NVIDIA/Model-Optimizer, which is not in its wheel


def serving_commands(model: str | Path, *, precision: str = "bf16", tp: int = 1) -> dict[str, list[str]]:
    """Engine -> its commands, in order; a pruned student is served as any model of its family is.

    vLLM quantises to FP8 as it loads, with scales of each batch; TensorRT-LLM reads a folder with calibrated scales.
    Raises InputError for what is no model, an unknown precision, and a TP that does not divide the heads.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision '{precision}' is unknown to the engines; {nearest(precision, PRECISIONS)}")
    if not str(model).isprintable():
        raise InputError(f"'{model}' has characters that no command line shows; give the folder another name")
    heads = from_hf(model).num_attention_heads
    if tp < 1 or heads % tp:
        legal = [size for size in range(1, heads + 1) if heads % size == 0]
        raise InputError(
            f"tp={tp} does not divide {heads} heads; the nearest legal tp is {min(legal, key=lambda n: abs(n - tp))}"
        )
    start = "./" if str(model).startswith("-") else ""  # an engine would take it for an option
    folder, quantised = (shlex.quote(f"{start}{model}{end}") for end in ("", QUANTISED))
    vllm = f"vllm serve {folder} --dtype bfloat16 --tensor-parallel-size {tp}"
    if precision == "bf16":
        return {"vllm": [vllm], "tensorrt_llm": [f"trtllm-serve {folder} --tp_size {tp}"]}
    calibrate = f"python {HF_PTQ} --pyt_ckpt_path {folder} --qformat fp8 --export_path {quantised}"
    return {
        "vllm": [f"{vllm} --quantization fp8"],
        "tensorrt_llm": [calibrate, f"trtllm-serve {quantised} --tp_size {tp}"],
    }
