"""Speculative decoding with a teacher and its student: writes the configurations for vLLM and TensorRT-LLM."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from nemo_minitron.artifacts.files import atomic_file, write_json
from nemo_minitron.errors import InputError
from nemo_minitron.families import check_draft

VLLM, TENSORRT_LLM = "vllm.json", "tensorrt_llm.yaml"


def write_draft(folder: str | Path, target: str | Path, draft: str | Path, tokens: int) -> list[str]:
    """Writes `vllm.json` (its speculative config) and `tensorrt_llm.yaml`; returns the command that takes each.

    `target`, `draft`: Hugging Face folders with one vocabulary; `tokens`: the number drafted at a time. Raises
    InputError if the vocabularies differ, or `tokens` is below 1.
    """
    if tokens < 1:
        raise InputError(f"{tokens} tokens are drafted at a time; the nearest legal number is 1")
    check_draft(target, draft)
    out, served, drafting = Path(folder), str(Path(target).resolve()), str(Path(draft).resolve())
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / VLLM, {"method": "draft_model", "model": drafting, "num_speculative_tokens": tokens})
    lines = (
        "disable_overlap_scheduler: true",  # TensorRT-LLM needs this for a separate draft model
        "speculative_config:",
        "  decoding_type: DraftTarget",
        f"  max_draft_len: {tokens}",
        f"  speculative_model_dir: {json.dumps(drafting)}",  # a JSON string is also a YAML string
    )
    with atomic_file(out / TENSORRT_LLM) as file:
        file.write_text("\n".join(lines) + "\n")
    served, *files = (shlex.quote(str(path)) for path in (served, out / VLLM, out / TENSORRT_LLM))
    return [
        f'vllm serve {served} --speculative-config "$(cat {files[0]})"',
        f"trtllm-serve {served} --extra_llm_api_options {files[1]}",
    ]
