"""Text that a Hugging Face folder writes: greedy, for the report's readers; sampled, to train other models on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.model import load
from nemo_minitron.families import from_hf
from nemo_minitron.families.tokenizer import check_ids, open_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    folder: str | Path, prompts: Sequence[str], *, max_new_tokens: int = 48, precision: str = "bf16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:  # fmt: skip
    """The greedy continuation of each prompt, without the prompt; the same on every run.

    Prompts run one at a time, since a batch would need padding. The sampling settings of the folder's generation config
    are ignored. `progress(prompts done, all)` is called after each. Raises InputError for a folder without model or
    tokenizer, and for an empty prompt.
    """
    tokenizer = _tokenizer(folder)
    encoded = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids.shape[-1]:
            raise InputError(f"the prompt {prompt!r} has no token; give at least one word")
        check_ids(ids.numpy(), tokenizer, from_hf(folder).vocab_size, prompt)
    model = load(folder, precision)
    settle(model, tokenizer, max_new_tokens, do_sample=False)
    texts = []
    for ids in encoded:
        texts.append(_continue(model, tokenizer, ids))
        progress(len(texts), len(encoded))
    return texts


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt's text and the text that a model wrote after it, which may be empty."""

    prompt: str
    continuation: str


def sample(
    folder: str | Path, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 1.0,
    top_p: float = 1.0, seed: int = 0, batch_size: int = 8, precision: str = "bf16",
    skip: Callable[[int], bool] = lambda first: False,
) -> Iterator[tuple[int, list[Completion]]]:  # fmt: skip
    """Yields for each batch, in order, its first prompt's place in `prompts` and the completions of its prompts.

    `prompts`: token ids. A batch has up to `batch_size` neighbours of one length, so that nothing is padded. Tokens
    are drawn at `temperature` from the likeliest ones that together have probability `top_p`, until the model ends
    the text; the folder's own sampling settings are ignored. Each batch has its own generator, seeded by `seed` and the
    batch's place, so a batch that `skip(first)` leaves out changes nothing in the others. Raises InputError for a
    folder without model or tokenizer, and for a prompt without a token.
    """
    tokenizer = _tokenizer(folder)
    for place, ids in enumerate(prompts):
        if not len(ids):
            raise InputError(f"prompt {place + 1} of {len(prompts)} has no token; give at least one word")
        check_ids(np.array(ids), tokenizer, from_hf(folder).vocab_size, f"prompt {place + 1}")
    left = [(first, rows) for first, rows in _batches(prompts, batch_size) if not skip(first)]
    if not left:
        return
    model = load(folder, precision)
    settle(model, tokenizer, max_new_tokens, do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    for first, rows in left:
        yield first, _draw(model, tokenizer, rows, [seed, first])


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[tuple[int, list[Sequence[int]]]]:
    first = 0
    for _, neighbours in itertools.groupby(prompts, key=len):
        while rows := list(itertools.islice(neighbours, size)):
            yield first, rows
            first += len(rows)


def _draw(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Sequence[int]], seed: list[int]
) -> list[Completion]:
    import torch

    ids = torch.tensor([list(row) for row in rows], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        drawn = model.generate(ids, attention_mask=torch.ones_like(ids))
    length = ids.shape[-1]
    return [Completion(_decoded(tokenizer, row[:length]), _after(tokenizer, row, length)) for row in drawn.tolist()]


def _tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    if not Path(folder).is_dir():
        raise InputError(f"the model folder '{folder}' does not exist")
    return open_tokenizer(folder)


def settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, **how: object) -> None:
    """Sets how `model.generate` writes: at most so many tokens, until the model ends the text, and as `how` says."""
    from transformers import GenerationConfig

    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    # Set as an attribute: if it were an argument, transformers would fill its defaults from the folder's settings.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=1, eos_token_id=eos, pad_token_id=pad, **how
    )


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    import torch

    ids = ids.to(model.device)
    with torch.inference_mode():
        rows = model.generate(ids, attention_mask=torch.ones_like(ids))
    return _after(tokenizer, rows[0].tolist(), ids.shape[-1])


def _after(tokenizer: PreTrainedTokenizerBase, output: list[int], length: int) -> str:
    """The text of the new tokens. They are decoded with the prompt if possible: alone they may lose a first space."""
    full_text, prompt, new = (_decoded(tokenizer, part) for part in (output, output[:length], output[length:]))
    return full_text[len(prompt) :] if full_text.startswith(prompt) else new


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
