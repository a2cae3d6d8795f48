"""NeMo's `PreTrainingDataModule` over indexed files, and the tokenizer that may go into NeMo's contexts.

Megatron's index of samples is built with C++ helpers, which megatron-core's wheel carries compiled.
Its samplers deal the samples of a global batch out in turn: global batch i is samples i * B to (i + 1) * B
of one shuffled order, whatever the data-parallel size; only who gets which differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts.files import naming, sync_tree
from nemo_minitron.artifacts.temporary import beside
from nemo_minitron.data.index_file import check_arrays
from nemo_minitron.data.indexed import Tokens, check_tokenizer
from nemo_minitron.data.vocabulary import load_tokenizer
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.families import on_disk
from nemo_minitron.families.tokenizer import copy_tokenizer

if TYPE_CHECKING:
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule


def data_module(
    train: str | Path,
    validation: str | Path,
    *,
    tokenizer: Any,
    sequence_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    seed: int = 1234,
    workers: int = 0,
    index_folder: str | Path | None = None,
    **options: Any,
) -> PreTrainingDataModule:
    """A data module over two prefixes (`indexed.build`); test is validation.

    Batches hold `tokens, labels, position_ids` int64 and `loss_mask` fp32, each [micro_batch_size,
    sequence_length]; no attention mask (after `backend.setup()`, or with Transformer Engine): attention is
    causal by itself. Positions and attention run across documents, EOS counts in the loss. `options` are
    PreTrainingDataModule's own.
    `tokenizer` is an HF folder, a hub id or NeMo's AutoTokenizer; the model's vocabulary is not touched.
    The index of samples goes to `index_folder`, unless given a folder beside `train`, under the digests of
    both corpora: Megatron's own cache is keyed by path and would survive a rebuilt corpus.

    Raises InputError: missing files, another tokenizer's tokens, a corpus too short for one sample or
    (validation) one global batch, a global batch that the micro batch does not divide.
    """
    _check_batch(micro_batch_size, global_batch_size)
    sources = _sources(train, validation, tokenizer, sequence_length, global_batch_size)
    folder = Path(index_folder or sources[0].prefix.with_name(sources[0].prefix.name + ".index"))
    check_arrays(folder / _identity(*sources))
    return _over(
        *sources,
        tokenizer=nemo_tokenizer(tokenizer, folder),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        seed=seed,
        num_workers=workers,
        index_mapping_dir=str(folder / _identity(*sources)),
        **({"pin_memory": False} | options),  # a batch is a few kB, and a CPU has nothing to pin for
    )


def _over(train: Tokens, validation: Tokens, **options: Any) -> PreTrainingDataModule:
    """NeMo's module over whole corpora, with the dataset that knows no padding."""
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

    from nemo_minitron.megatron.dataset import PackedDataset

    places = {"train": train, "validation": validation, "test": validation}
    paths = {name: [str(source.prefix)] for name, source in places.items()}
    module = PreTrainingDataModule(paths=paths, split=None, **options)
    # Set, not passed: what is passed lands in NeMo's context, where a foreign class cannot be loaded.
    module.dataset_cls = PackedDataset
    return module


def nemo_tokenizer(source: Any, folder: str | Path) -> Any:
    """NeMo's AutoTokenizer for an HF folder or hub id; one that is NeMo's already is given back.

    NeMo copies the tokenizer's whole folder into the context of every checkpoint, weights and all. So the
    tokenizer's files of a model folder are copied once to `folder`, and NeMo is given that copy.
    """
    if not isinstance(source, (str, Path)):
        return source
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    lies = on_disk(source)
    where = _tokenizer_copy(lies, Path(folder)) if lies is not None and lies.is_dir() else source
    try:
        return AutoTokenizer(str(where), use_fast=True, trust_remote_code=False)
    except Exception as error:  # of a damaged tokenizer.json the tokenizers library raises Exception itself
        raise InputError(f"'{source}' gives no tokenizer: {first_line(error)}") from error


def _tokenizer_copy(source: Path, folder: Path) -> Path:
    """A folder with the tokenizer's files alone, named by their content: made once, never changed."""
    with naming(folder), beside(folder / "tokenizer") as hidden:
        partial = hidden / "tokenizer"
        partial.mkdir()
        copy_tokenizer(source, partial)
        digest = hashlib.sha256()
        for file in sorted(file for file in partial.rglob("*") if file.is_file()):
            digest.update(str(file.relative_to(partial)).encode() + b"\0" + file.read_bytes())
        target = folder / f"tokenizer-{digest.hexdigest()[:16]}"
        sync_tree(partial)
        with contextlib.suppress(OSError):  # it is there, or another process was first: with the same bytes
            os.rename(partial, target)
    if not target.is_dir():
        raise InputError(f"the tokenizer's files could not be put into '{target}'")
    return target


def _sources(
    train: str | Path, validation: str | Path, tokenizer: Any, sequence_length: int, global_batch_size: int
) -> tuple[Tokens, Tokens]:
    """Opens both corpora and refuses what does not fit, before NeMo's slow import."""
    sources = Tokens(train), Tokens(validation)
    for name, source, samples in zip(("training", "validation"), sources, (1, global_batch_size), strict=True):
        _check_length(name, source, sequence_length, samples)
        check_tokenizer(source.prefix, load_tokenizer(tokenizer))
    return sources


def _identity(*sources: Tokens) -> str:
    """Names the index folder by what the corpora hold: digests, or size and time without a sidecar."""
    digest = hashlib.sha256()
    for source in sources:
        state = source.prefix.with_name(source.prefix.name + ".bin").stat()
        corpus = source.corpus
        held = (corpus.content, corpus.tokenizer) if corpus else (state.st_size, state.st_mtime_ns)
        digest.update(repr(held).encode())
    return digest.hexdigest()[:16]


def _check_batch(micro: int, whole: int) -> None:
    if micro < 1 or whole < 1 or whole % micro:
        legal = max(micro, whole - whole % micro) if micro > 0 and whole > 0 else 1
        raise InputError(
            f"the global batch is {whole} and the micro batch {micro}: the first must be a multiple of the "
            f"second, give a global batch of {legal}"
        )


def _check_length(name: str, source: Tokens, sequence_length: int, samples: int) -> None:
    """A sample of Megatron's is one token longer than the sequence: the last label."""
    given = max(0, (source.tokens - 1) // sequence_length)
    longest = max(1, (source.tokens - 1) // samples)
    if given < samples:
        raise InputError(
            f"the {name} corpus gives {given} samples of {sequence_length} tokens, {samples} are needed for "
            f"one batch: give a sequence length of {longest} or less, or more text"
        )
