"""Text in Megatron's indexed files, written from token ids."""

from pathlib import Path

import numpy as np

from nemo_minitron.data.index_writer import megatron


def write_indexed(prefix: Path, documents) -> Path:
    """Writes `documents`, each a sequence of int32 ids, to PREFIX.bin and PREFIX.idx. Returns `prefix`."""
    builder = megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(np.asarray(document, dtype=np.int32), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix
