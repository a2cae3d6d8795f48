"""A teacher and a corpus -> a cache of the teacher's logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.artifacts.files import digest_of
from nemo_minitron.artifacts.logit_cache import HEADER, CacheHeader, LogitCache, data_digest, missing, torn
from nemo_minitron.artifacts.temporary import sweep
from nemo_minitron.commands.corpus import begin, say, tokenise
from nemo_minitron.commands.passes import fit_pass
from nemo_minitron.commands.place import check_writable, working
from nemo_minitron.errors import InputError
from nemo_minitron.families import megatron_fields
from nemo_minitron.hosts import check_model, host_of
from nemo_minitron.launch.torchrun import launch
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import CacheOrder
from nemo_minitron.settings.validated import check_whole
from nemo_minitron.sources.tensors import ModelSource

if TYPE_CHECKING:
    from nemo_minitron.data import Tokens


def run_cache(
    model: str, data: str, out: Path, settings: CacheSettings, layout: Layout, *, samples: int | None = None,
    rows_per_shard: int = 256, micro_batch_size: int = 1, log: Path | None = None, skip_bad_lines: bool = False,
) -> CacheHeader:  # fmt: skip
    """`minitron cache-logits`: makes the cache `out`, or the shards that it lacks. All ranks must see the folder.

    `samples`: the number of rows, the first ones of the text; None means all. Raises InputError for what cannot run,
    and if `out` is a cache of another model, text or settings.
    """
    from nemo_minitron.sources.open import open_source

    for name, value in (("rows_per_shard", rows_per_shard), ("micro_batch_size", micro_batch_size)):
        check_whole(name, value)
    source = open_source(model)
    check_model(source.config, "cache-logits")
    fit = fit_pass(source, settings, layout, micro_batch_size)
    settings = fit.settings
    _check_out(out)
    begin(f"caching logits of {model} on {data}")
    with working(out) as work:
        tokens = tokenise(data, source.folder, work / "train", source.architecture.vocab_size, skip_bad_lines)
        fit.text(tokens)
        say(fit.remark)
        settings = fit.settings
        rows = whole_rows(tokens, settings.sequence_length, samples)
        header = CacheHeader(
            settings, teacher_digest(source), corpus_digest(tokens, rows, settings.sequence_length),
            source.architecture.vocab_size, rows, rows_per_shard,
        )  # fmt: skip
        header = _opened(header, out)
        for path in torn(out, header):
            print(f"{path} is damaged and is made again", flush=True)
            path.unlink()
        if missing(out, header):
            order = CacheOrder(source.path, tokens.prefix, out, layout, micro_batch_size)
            launch(order, host_of().worker, log or work / "log.txt")
    return header


def whole_rows(tokens: Tokens, sequence_length: int, samples: int | None = None) -> int:
    """The number of rows in which each token has a label. Raises InputError if the text has none, or fewer than
    `samples`."""
    rows = max(0, (tokens.tokens - 1) // sequence_length)
    if not rows:
        raise InputError(
            f"the corpus has {tokens.tokens} tokens, which is less than a row of {sequence_length} and its last "
            f"label; the longest legal sequence length is {max(1, tokens.tokens - 1)}"
        )
    if samples is not None and not 1 <= samples <= rows:
        raise InputError(f"samples is {samples}, but the corpus has {rows} rows; give {min(max(samples, 1), rows)}")
    return samples or rows


def teacher_digest(source: ModelSource) -> str:
    """Identity of a model's weights and config, the same from a Hugging Face folder and a checkpoint."""
    return digest_of([source.digest, *megatron_fields(source.config)])


def corpus_digest(tokens: Tokens, rows: int, sequence_length: int) -> str:
    """The digest of the first rows of a corpus."""
    return data_digest(lambda row: tokens.stream(row * sequence_length, sequence_length), rows, sequence_length)


def check_cache(cache: Path, train: Path, teacher: ModelSource | None = None) -> CacheHeader:
    """The header of a cache. Raises InputError if the cache is not whole, is of another text than that of the .bin/.idx
    prefix `train`, or of another teacher than the given one."""
    from nemo_minitron.data import Tokens

    header, tokens = LogitCache(cache).header, Tokens(train)
    length = header.settings.sequence_length
    long_enough = whole_rows(tokens, length) >= header.rows
    header.check(cache, data=corpus_digest(tokens, header.rows, length) if long_enough else "a shorter text")
    if teacher is not None:
        header.check(cache, model=teacher_digest(teacher))
    return header


def _opened(header: CacheHeader, out: Path) -> CacheHeader:
    """The header of a cache that is begun or resumed. A resumed cache keeps its rows per shard. Raises InputError."""
    if not (out / HEADER).exists():
        out.mkdir(parents=True, exist_ok=True)
        header.save(out)
    existing = CacheHeader.load(out)
    sweep(out)
    existing.check(out, model=header.model)  # one by one, so that the refusal names the first thing that differs
    for name, value in header.settings.identity().items():
        existing.check(out, **{name: value})
    existing.check(out, rows=header.rows)
    existing.check(out, data=header.data)
    return existing


def _check_out(out: Path) -> None:
    """Raises InputError for a folder that holds anything but a cache: it is never written to."""
    check_writable(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / HEADER).exists()):
        raise InputError(f"'{out}' exists and is no logit cache; give a new folder with --out")
