"""The commands that serve a Hugging Face folder in vLLM, TensorRT-LLM, llama.cpp and Ollama, in bf16 or FP8."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

from nemo_minitron.errors import InputError, nearest
from nemo_minitron.families import check_stage, family_of, read_config, unserved

PRECISIONS = ("bf16", "fp8")
QUANTISED = "-fp8"  # ending of the folder that Model Optimizer quantises for TensorRT-LLM, beside the model's own
HF_PTQ = "examples/llm_ptq/hf_ptq.py"  # from github.com/NVIDIA/Model-Optimizer; its wheel lacks it
TO_GGUF = "convert_hf_to_gguf.py"  # from github.com/ggml-org/llama.cpp
NO_GGUF = ("MinistralForCausalLM",)  # classes of this package's families that TO_GGUF does not know


def serving_commands(model: str | Path, *, precision: str = "bf16", tp: int = 1) -> dict[str, list[str]]:
    """Engine -> its commands, in order; a pruned student is served like any model of its family.

    vLLM quantises to FP8 while it loads, with scales of each batch; TensorRT-LLM reads a folder with calibrated scales.
    llama.cpp and Ollama have no FP8, and share a file that the first of llama.cpp's commands writes to the working
    folder. An engine that runs another model than the config's is left out (`families.unserved`). Raises InputError if
    `model` is no model, the precision is unknown, `tp` does not divide the heads, or every engine is left out.
    """
    _check(model, precision, tp)
    start = "./" if str(model).startswith("-") else ""  # an engine would read the name as an option
    folder, quantised = (shlex.quote(f"{start}{model}{end}") for end in ("", QUANTISED))
    vllm = f"vllm serve {folder} --dtype bfloat16 --tensor-parallel-size {tp}"
    without = unserved(read_config(model))
    if precision == "fp8":
        calibrate = f"python {HF_PTQ} --pyt_ckpt_path {folder} --qformat fp8 --export_path {quantised}"
        commands = {
            "vllm": [f"{vllm} --quantization fp8"],
            "tensorrt_llm": [calibrate, f"trtllm-serve {quantised} --tp_size {tp}"],
        }
        return _without(commands, without)
    commands = {"vllm": [vllm], "tensorrt_llm": [f"trtllm-serve {folder} --tp_size {tp}"]}
    known = family_of(read_config(model)).hf_class not in NO_GGUF
    return _without(commands | _with_gguf(model, folder) if known else commands, without)


def _without(commands: dict[str, list[str]], why: dict[str, str]) -> dict[str, list[str]]:
    """The commands of the engines that run the model. Ollama's come after llama.cpp's."""
    gone = {*why, *(["ollama"] if "llama_cpp" in why else [])}
    if not commands.keys() - gone:
        told = ". ".join(f"{engine} {reason}" for engine, reason in why.items() if engine in commands)
        raise InputError(f"no engine is known to serve this model, though transformers runs it: {told}")
    return {engine: lines for engine, lines in commands.items() if engine not in gone}


def _check(model: str | Path, precision: str, tp: int) -> None:
    """Refuses what `serving_commands` refuses."""
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


def _with_gguf(model: str | Path, folder: str) -> dict[str, list[str]]:
    """llama.cpp's and Ollama's commands. Both name the model after its folder, in letters that both take."""
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(model).resolve().name.lower()).strip("-.") or "student"
    file, instructions = f"{name}.gguf", f"{name}.Modelfile"
    return {
        "llama_cpp": [
            f"python {TO_GGUF} {folder} --outfile {file} --outtype bf16",
            f"llama-server --model {file}",
        ],
        "ollama": [
            f"echo 'FROM ./{file}' > {instructions}",
            f"ollama create {name} --file {instructions}",
            f"ollama run {name}",
        ],
    }
