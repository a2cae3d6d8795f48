"""The stage `cache-logits`: a teacher, loaded by reading in any layout, and text -> a cache of its logits."""

from __future__ import annotations

import time
from collections.abc import Callable

from nemo_minitron.artifacts.logit_cache import CacheHeader
from nemo_minitron.data import Tokens
from nemo_minitron.distillation.cache import make
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.megatron.progress import say
from nemo_minitron.settings.orders import CacheOrder
from nemo_minitron.sources.open import open_source


def cache_logits(order: CacheOrder, host: Builder) -> None:
    """Makes the shards that the cache lacks."""
    header, tokens = CacheHeader.load(order.out), Tokens(order.data)
    length = header.settings.sequence_length
    source = open_source(order.model)
    chunks = load(source, build=host.build, precision=header.settings.precision, layout=order.layout)
    make(
        chunks, header, order.out, lambda row: tokens.stream(row * length, length), order.micro_batch_size,
        _progress(header),
    )  # fmt: skip


def _progress(header: CacheHeader) -> Callable[[int, int], None]:
    start, first = time.perf_counter(), []

    def to(done: int, of: int) -> None:
        first.append(done)
        line = f"shard {done}/{of}"
        if len(first) > 1:
            rate = (done - first[0]) * header.rows_per_shard * header.settings.sequence_length
            line += f"  {rate / (time.perf_counter() - start):.0f} tokens/s"
        say(line)

    return to
