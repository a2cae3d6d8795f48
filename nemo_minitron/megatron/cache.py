"""The stage `cache-logits`: the teacher reads the text and leaves a cache of its logits, in any layout."""

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
    """Makes the shards that the cache `order.out` lacks. Collective.

    Raises InputError if the cache's header, the text or the model cannot be read, or if the model cannot have this
    precision or layout.
    """
    header, tokens = CacheHeader.load(order.out), Tokens(order.data)
    length = header.settings.sequence_length
    source = open_source(order.model)
    chunks = load(source, build=host.build, precision=header.settings.precision, layout=order.layout)
    make(
        chunks, header, order.out, lambda row: tokens.stream(row * length, length), order.micro_batch_size,
        _progress(header),
    )  # fmt: skip


def _progress(header: CacheHeader) -> Callable[[int, int], None]:
    """A function that is called with (shards that exist, shards in all) and prints the line of progress."""
    start, counts = time.perf_counter(), []

    def report(done: int, of: int) -> None:
        counts.append(done)
        line = f"shard {done}/{of}"
        if len(counts) > 1:  # the first call may count the shards of an earlier run, which took no time now
            tokens = (done - counts[0]) * header.rows_per_shard * header.settings.sequence_length
            line += f"  {tokens / (time.perf_counter() - start):.0f} tokens/s"
        say(line)

    return report
