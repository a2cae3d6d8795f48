"""The rows of a calibration, from Megatron's GPT dataset alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from nemo_minitron.data.indexed import check_tokenizer
from nemo_minitron.data.vocabulary import load_tokenizer
from nemo_minitron.megatron.dataset import windowed
from nemo_minitron.megatron.estimate import Estimation


class Ids:
    """What Megatron's dataset asks of a tokenizer, for rows without padding."""

    def __init__(self, tokenizer: Any) -> None:
        self.eod = self.pad = tokenizer.eos_token_id
        self.vocab_size = len(tokenizer)
        self.unique_identifiers = {"class": type(tokenizer).__name__}


def rows(estimation: Estimation, first: int, samples: int, length: int) -> Sequence[dict[str, Any]]:
    """As `hosts.protocol.Host.rows`."""
    settings, prefix = estimation.calibration, estimation.tokens.prefix
    estimation.tokens.check_rows(settings.sequence_length, samples)
    tokenizer = load_tokenizer(str(estimation.source.folder))
    check_tokenizer(prefix, tokenizer)
    config = GPTDatasetConfig(
        random_seed=settings.seed, sequence_length=settings.sequence_length, tokenizer=Ids(tokenizer),
        blend_per_split=[([str(prefix)], None), ([str(prefix)], None), None],
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        path_to_cache=str(estimation.order.work / "index"),
    )  # fmt: skip
    builder = BlendedMegatronDatasetBuilder(windowed(first, samples, length), [None, length, None], _everywhere, config)
    return builder.build()[1]


def _everywhere() -> bool:
    return True
