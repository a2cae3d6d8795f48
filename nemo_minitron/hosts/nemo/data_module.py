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
from nemo_minitron.data.indexed import Tokens
from nemo_minitron.data.training import check_batch, index_name, training_corpora
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
    check_batch(micro_batch_size, global_batch_size)
    sources = training_corpora(train, validation, tokenizer, sequence_length, global_batch_size)
    folder = Path(index_folder or sources[0].prefix.with_name(sources[0].prefix.name + ".index"))
    check_arrays(folder / index_name(*sources))
    return _over(
        *sources,
        tokenizer=nemo_tokenizer(tokenizer, folder),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        seed=seed,
        num_workers=workers,
        index_mapping_dir=str(folder / index_name(*sources)),
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
