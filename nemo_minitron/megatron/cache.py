"""The stage `cache-logits`: the teacher reads the text and leaves a cache of its logits, in any layout."""

from __future__ import annotations

from collections.abc import Callable

from nemo_minitron.artifacts.logit_cache import CacheHeader, missing
from nemo_minitron.data import Tokens
from nemo_minitron.distillation.cache import make
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.megatron.progress import Report
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
        _progress(header, header.shards - len(missing(order.out, header))),
    )  # fmt: skip


def _progress(header: CacheHeader, done: int) -> Callable[[int, int], None]:
    """A function of (shards that exist, shards in all) that reports them. `done`: those of an earlier run."""
    report = Report("shard", scale=header.rows_per_shard * header.settings.sequence_length, done=done)
    return lambda done, of: report(done, of, line=True)
