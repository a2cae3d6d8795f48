"""Greedy text of a Hugging Face folder: what a reader of the report sees of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.model import load


def generate(
    folder: str | Path, prompts: Sequence[str], *, max_new_tokens: int = 48, precision: str = "bf16"
) -> list[str]:
    """The continuation of each prompt (without the prompt), greedy, so the same on every run.

    One prompt at a time: a batch would need padding. Sampling settings of the folder's generation config
    are left aside. Raises InputError for a folder without model or tokenizer, and for an empty prompt.
    """
    tokenizer = _tokenizer(folder)
    encoded = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids.shape[-1]:
            raise InputError(f"the prompt {prompt!r} has no token; give at least one word")
    model = load(folder, precision)
    _be_greedy(model, tokenizer, max_new_tokens)
    return [_continue(model, tokenizer, ids) for ids in encoded]


def _tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise InputError(f"the model folder '{folder}' does not exist")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a damaged tokenizer.json the tokenizers library raises Exception itself
        raise InputError(f"'{folder}' has no tokenizer that transformers can load ({error})") from error


def _be_greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> None:
    from transformers import GenerationConfig

    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    # Set, not handed over: transformers fills what is handed over at its default from the folder's settings.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=eos, pad_token_id=pad
    )


def _continue(model: Any, tokenizer: Any, ids: Any) -> str:
    import torch

    ids = ids.to(model.device)
    with torch.inference_mode():
        rows = model.generate(ids, attention_mask=torch.ones_like(ids))
    return _after(tokenizer, rows[0].tolist(), ids.shape[-1])


def _after(tokenizer: Any, output: list[int], length: int) -> str:
    """Text of the new tokens. Decoded with the prompt where that works: alone they may lose a first space."""
    whole, prompt, new = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (output, output[:length], output[length:])
    )
    return whole[len(prompt) :] if whole.startswith(prompt) else new
