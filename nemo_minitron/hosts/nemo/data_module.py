"""NeMo's `PreTrainingDataModule` over indexed files, and a copy of the tokenizer that may go into NeMo's contexts.

Megatron builds its index of samples with C++ helpers, which are compiled in megatron-core's wheel. Its samplers deal
the samples of a global batch out to the ranks in turn. Global batch i has the samples i * B to (i + 1) * B - 1 of one
shuffled order for every data-parallel size; only the rank of a sample depends on that size.
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
    """A data module over the prefixes `train` and `validation` of two corpora (`data.build`). Test is validation.

    Batches hold `tokens`, `labels` and `position_ids` (int64) and `loss_mask` (fp32), each [micro_batch_size,
    sequence_length]. They have no attention mask (after `backend.setup()`, or with Transformer Engine), because the
    attention is causal without one. Positions and attention run across documents, and EOS counts in the loss.

    `tokenizer`: a Hugging Face folder, a hub id or NeMo's AutoTokenizer. The model's vocabulary does not depend on it.
    `index_folder`: where the index of samples goes; a folder beside `train` by default. The index lies there under the
    digests of both corpora, because Megatron's own cache goes by path and would survive a corpus that was rebuilt.
    `options`: those of PreTrainingDataModule.

    Raises InputError if a file is missing, if the tokens come from another tokenizer, if a corpus is too short for one
    sample or (validation) for one global batch, or if the micro batch does not divide the global batch.
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
        **({"pin_memory": False} | options),  # a batch has a few kB, and pinned memory serves only copies to a GPU
    )


def _over(train: Tokens, validation: Tokens, **options: Any) -> PreTrainingDataModule:
    """NeMo's module over whole corpora, with the dataset that treats no token as padding."""
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

    from nemo_minitron.megatron.dataset import PackedDataset

    places = {"train": train, "validation": validation, "test": validation}
    paths = {name: [str(source.prefix)] for name, source in places.items()}
    module = PreTrainingDataModule(paths=paths, split=None, **options)
    # This is not an argument: NeMo would write it to a checkpoint's context, which must load without this package.
    module.dataset_cls = PackedDataset
    return module


def nemo_tokenizer(source: Any, folder: str | Path) -> Any:
    """NeMo's AutoTokenizer for a Hugging Face folder or a hub id. A tokenizer of NeMo's is returned as it is.

    NeMo copies the tokenizer's whole folder to the context of every checkpoint. In a model's folder that would include
    the weights. So the tokenizer's files alone are copied once to `folder`, and NeMo gets that copy.

    Raises InputError if `source` has no tokenizer that can be loaded.
    """
    if not isinstance(source, (str, Path)):
        return source
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    model = on_disk(source)
    where = _tokenizer_copy(model, Path(folder)) if model is not None and model.is_dir() else source
    try:
        return AutoTokenizer(str(where), use_fast=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself for a damaged tokenizer.json
        raise InputError(f"'{source}' gives no tokenizer: {first_line(error)}") from error


def _tokenizer_copy(source: Path, folder: Path) -> Path:
    """A folder with the tokenizer's files alone. Its name has a digest of their content, so it is made once and never
    changed."""
    with naming(folder), beside(folder / "tokenizer") as hidden:
        partial = hidden / "tokenizer"
        partial.mkdir()
        copy_tokenizer(source, partial)
        digest = hashlib.sha256()
        for file in sorted(file for file in partial.rglob("*") if file.is_file()):
            digest.update(str(file.relative_to(partial)).encode() + b"\0" + file.read_bytes())
        target = folder / f"tokenizer-{digest.hexdigest()[:16]}"
        sync_tree(partial)
        with contextlib.suppress(OSError):  # another process may have made it: the bytes are the same
            os.rename(partial, target)
    if not target.is_dir():
        raise InputError(f"the tokenizer's files could not be put into '{target}'")
    return target


def _sources(
    train: str | Path, validation: str | Path, tokenizer: Any, sequence_length: int, global_batch_size: int
) -> tuple[Tokens, Tokens]:
    """Opens both corpora. It refuses unfit input before NeMo's slow import."""
    sources = Tokens(train), Tokens(validation)
    for name, source, samples in zip(("training", "validation"), sources, (1, global_batch_size), strict=True):
        _check_length(name, source, sequence_length, samples)
        check_tokenizer(source.prefix, load_tokenizer(tokenizer))
    return sources


def _identity(*sources: Tokens) -> str:
    """A name for the index folder, made from the corpora's digests. A corpus without a sidecar file has no digest; its
    size and time take the digest's place."""
    digest = hashlib.sha256()
    for source in sources:
        state = source.prefix.with_name(source.prefix.name + ".bin").stat()
        corpus = source.corpus
        content = (corpus.content, corpus.tokenizer) if corpus else (state.st_size, state.st_mtime_ns)
        digest.update(repr(content).encode())
    return digest.hexdigest()[:16]


def _check_batch(micro: int, total: int) -> None:
    """Raises InputError if micro batches of `micro` rows do not fill a global batch of `total` rows."""
    if micro < 1 or total < 1 or total % micro:
        legal = max(micro, total - total % micro) if micro > 0 and total > 0 else 1
        raise InputError(
            f"the global batch is {total} and the micro batch {micro}: the first must be a multiple of the "
            f"second, give a global batch of {legal}"
        )


def _check_length(name: str, source: Tokens, sequence_length: int, samples: int) -> None:
    """Raises InputError if a corpus has fewer samples. Megatron's samples have one token more than the sequence, the
    last label."""
    available = max(0, (source.tokens - 1) // sequence_length)
    longest = max(1, (source.tokens - 1) // samples)
    if available < samples:
        raise InputError(
            f"the {name} corpus gives {available} samples of {sequence_length} tokens, {samples} are needed for "
            f"one batch: give a sequence length of {longest} or less, or more text"
        )
