"""A model's tokenizer and a corpus -> Scores of the axis `vocab`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.commands.corpus import begin, tokenise
from nemo_minitron.commands.place import check_file
from nemo_minitron.errors import InputError
from nemo_minitron.families import check_stage
from nemo_minitron.pruning.vocabulary import Vocabulary, count_tokens


def rank_tokens(model: str, data: str, out: Path, skip_bad_lines: bool = False, overwrite: bool = False) -> Scores:
    """`minitron rank-tokens`: adds the scores of `vocab`, counted over the whole corpus, to the file of scores `out`.
    The file is made if it does not exist. Scores of `vocab` that it has are replaced only under `overwrite`.

    Raises InputError for a tokenizer that cannot be cut, and if `out` belongs to another model.
    """
    from nemo_minitron.sources.open import open_source

    check_file(out)
    source = open_source(model)
    check_stage(source.config, "rank-tokens")
    rows = source.architecture.vocab_size
    digest, vocabulary = source.digest, Vocabulary(source.folder, rows)
    scores = Scores.load(out) if out.exists() else Scores(source.architecture, {}, model_digest=digest)
    if scores.model_digest not in (None, digest):
        raise InputError(f"the scores '{out}' are of another model; give another --out")
    if "vocab" in scores.tensors and not overwrite:
        raise InputError(f"the scores '{out}' already have an order of the tokens; give another --out, or --overwrite")
    begin(f"counting the tokens of {data}")
    with apart() as scratch:
        tokens = tokenise(data, source.folder, scratch / "corpus", rows, skip_bad_lines)
        counts = count_tokens(tokens, rows)
    notes = {"vocab": {"tokens": int(counts.sum()), "seen": int((counts > 0).sum()), "data": data}}
    tensors = scores.tensors | {"vocab": vocabulary.scores(counts)}
    scores = dataclasses.replace(scores, tensors=tensors, notes=scores.notes | notes)
    scores.save(out)
    return scores
