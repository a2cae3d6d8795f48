"""A conversation with a Hugging Face folder: the answer is shown while the model writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.generation import settle
from nemo_minitron.evaluation.model import load
from nemo_minitron.families.tokenizer import check_ids, open_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, str]


class Speaker:
    """A model that remembers its conversation. `templated`: whether its tokenizer has a chat template; without one the
    model continues each text by itself.

    `new_tokens`: most tokens of an answer. `temperature`: 0 is greedy. Raises InputError for a folder without a model
    or a tokenizer.
    """

    def __init__(
        self, folder: str | Path, *, new_tokens: int, temperature: float = 0.0, system: str = "",
        precision: str = "bf16",
    ) -> None:  # fmt: skip
        self.tokenizer = open_tokenizer(folder)
        self.model, self.new_tokens = load(folder, precision), new_tokens
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        settle(self.model, self.tokenizer, new_tokens, **drawn)
        self.templated = bool(self.tokenizer.chat_template)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system and self.templated else []

    @property
    def positions(self) -> int | None:
        """The most tokens of prompt and answer. None if the config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """The answer to a message, or the continuation of a text. `show` gets its parts while it is written. Old
        messages are forgotten when the conversation gets too long. Raises InputError for a message that is too long."""
        import torch

        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(asked, text)
        while self._too_long(ids) and (older := self._oldest(asked)) is not None:
            del asked[older : older + 2]  # a message and its answer
            ids = self._ids(asked, text)
        if self._too_long(ids):
            most = (self.positions or 0) - self.new_tokens
            raise InputError(
                f"the message has {ids.shape[1]:,} tokens, and the model has room for {max(0, most):,} beside an "
                f"answer of {self.new_tokens:,}; shorten it, or give a smaller --new-tokens"
            )
        check_ids(ids.cpu().numpy(), self.tokenizer, self.model.config.vocab_size, text)
        stream = _stream(self.tokenizer, show)
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stream)
        written = "".join(stream.parts)
        if self.templated:
            self.messages = [*asked, {"role": "assistant", "content": written}]
        return written

    def _ids(self, messages: list[Message], text: str) -> Tensor:
        """Token ids [1, length] of the whole conversation."""
        if not self.templated:
            return self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.model.device)
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        encoded = self.tokenizer(whole, return_tensors="pt", add_special_tokens=False)
        return encoded["input_ids"].to(self.model.device)

    def _too_long(self, ids: Tensor) -> bool:
        return self.positions is not None and ids.shape[1] + self.new_tokens > self.positions

    def _oldest(self, messages: list[Message]) -> int | None:
        """The place of the oldest message that may be forgotten; None if only the last one is left."""
        first = int(messages[0]["role"] == "system")
        return first if len(messages) > first + 1 else None


def seed_draws(seed: int) -> None:
    """Makes the draws of all speakers those of a seed."""
    import torch

    torch.manual_seed(seed)


def _stream(tokenizer: Any, show: Callable[[str], None]) -> Any:
    """transformers' streamer, which gives whole words to `show` and keeps them in `parts`."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self.parts: list[str] = []

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.parts.append(text)
            show(text)

    return Stream()
