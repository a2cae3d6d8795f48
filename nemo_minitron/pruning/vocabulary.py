"""A vocabulary that is cut with its embeddings: tokenizer.json is rewritten, and ids are renumbered in every config.

If all tokens of a text stay, it is encoded as before, with the new ids. Other text is encoded with smaller tokens. Both
decode to the same text, because byte tokens, special tokens and, for BPE, all parts of a kept token always stay. For
BPE that is enough: the merges of a text lie within its tokens, in the order in which each token alone is merged, so no
merge is missing and none comes too early. In a Unigram model the best path is still the best if there are fewer paths.
Only JSON is read and written. Byte-level and byte-fallback BPE and Unigram of Hugging Face's `tokenizers` are
supported.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.json_types import Json, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.side_files import OTHER_VOCABULARIES, side_files

if TYPE_CHECKING:
    from nemo_minitron.data import Tokens

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NAMING = ("config.json", "generation_config.json", "tokenizer_config.json")
"""Files, besides tokenizer.json, that are copied to a student and name tokens by their ids."""
IDS = ("token_id", "token_ids", "suppress_tokens", "words_ids")
"""A key of a config with such an end holds an id, ids, or lists of ids: `eos_token_id`, `bad_words_ids`, ..."""
CHUNK = 1 << 20  # tokens counted at a time


def count_tokens(tokens: Tokens, vocab_size: int) -> np.ndarray:
    """How often each id occurs in a tokenised corpus (`data.Tokens`), int64 [vocab_size].

    Raises InputError for a corpus of another tokenizer.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, tokens.tokens, CHUNK):
        in_chunk = np.bincount(tokens.stream(start, min(CHUNK, tokens.tokens - start)))
        if len(in_chunk) > vocab_size:
            raise InputError(f"the corpus holds token {len(in_chunk) - 1}; the model has 0 to {vocab_size - 1}")
        counts[: len(in_chunk)] += in_chunk
    return counts


class Vocabulary:
    """The tokenizer.json of a model folder, and which of its tokens need each other.

    `vocab_size`: the rows of the model's embedding. Tokens beyond it cannot be used and are ignored. `tokens`: text ->
    id, with added tokens. `required`: ids that always stay. Raises InputError for a folder without tokenizer.json, and
    for models other than byte-level or byte-fallback BPE and Unigram.
    """

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self.folder, self.rows = Path(folder), range(vocab_size)
        self.values = read_json(self.folder / "tokenizer.json", "the tokenizer")
        try:
            self.model = self.values["model"]
            self.kind = self.model["type"]
            self._check()
            self.added = {t["content"]: t["id"] for t in self.values["added_tokens"] if t["id"] in self.rows}
            listed = self.model["vocab"]
            plain = dict(listed) if self.kind == "BPE" else {token: i for i, (token, _) in enumerate(listed)}
            self.tokens = {token: i for token, i in (plain | self.added).items() if i in self.rows}
            self.required = self._required()
            self._ranks = {pair: rank for rank, pair in enumerate(self._merges())}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"'{self.folder / 'tokenizer.json'}' is no tokenizer ({error!r})") from None

    def _check(self) -> None:
        if self.kind not in ("BPE", "Unigram"):
            raise InputError(f"a {self.kind} tokenizer cannot be cut; BPE and Unigram can: leave 'vocab' out")
        if self.kind == "BPE" and (self.model.get("continuing_subword_prefix") or self.model.get("end_of_word_suffix")):
            raise InputError("a BPE tokenizer that marks the parts of words cannot be cut; leave 'vocab' out")

    def _required(self) -> set[int]:
        """Added tokens, the unknown token, single characters, bytes, and ids that configs name."""
        unknown = self.model.get("unk_token") if self.kind == "BPE" else self.model.get("unk_id")
        required = set(self.added.values()) | set(self._named())
        if unknown is not None:
            required.add(self.tokens[unknown] if isinstance(unknown, str) else unknown)
        bytes_ = {i for token, i in self.tokens.items() if BYTE.fullmatch(token)}
        if self.model.get("byte_fallback") and len(bytes_) == 256:
            return required | bytes_
        return required | {i for token, i in self.tokens.items() if len(token) == 1}

    def _named(self) -> Iterator[int]:
        """Ids in the files that are copied. Ids beyond the embedding name no token of this model."""
        for name in NAMING:
            if (self.folder / name).is_file():
                ids: list[int] = []
                renumbered(read_json(self.folder / name, "the config"), ids.append)
                yield from (i for i in ids if i in self.rows)

    def _merges(self) -> list[tuple[str, str]]:
        """The merges in the order of their ranks. Older files write a pair as one text."""
        merges = self.model.get("merges", [])
        return [(a, b) for a, b in (m.split(" ") if isinstance(m, str) else m for m in merges)]

    # -- tokens that need each other -----------------------------------------------------------------
    def parts(self, token: str) -> set[int]:
        """Ids of the tokens that `token` alone is merged from, without its own id. Empty for Unigram."""
        if self.kind != "BPE" or token in self.added:
            return set()
        pieces, through = list(token), set(token)
        while len(pieces) > 1:
            pairs = enumerate(itertools.pairwise(pieces))
            rank, at = min((self._ranks.get(pair, len(self._ranks)), at) for at, pair in pairs)
            if rank == len(self._ranks):
                return set()  # no merges lead to this token
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
            through.add(pieces[at])
        return {self.tokens[piece] for piece in through - {token} if piece in self.tokens}

    def scores(self, counts: np.ndarray) -> np.ndarray:
        """`counts` [V] -> ranks by count, fp32 [V], V for the first token and 1 for the last.

        The best n have all tokens that they need, for every n that includes the required ones. Required tokens come
        first. The parts of a token count at least as much as the token and come before it. Rows without a token come
        last. They are ranks, not counts, so that no two are equal even in fp32.
        """
        raised, length = np.full(len(counts), -1.0), np.zeros(len(counts))
        for token, i in self.tokens.items():
            raised[i], length[i] = counts[i], len(token)
        for token, i in sorted(self.tokens.items(), key=lambda item: -len(item[0])):
            for part in self.parts(token):  # shorter, so that its own turn comes later
                raised[part] = max(raised[part], raised[i])
        raised[sorted(self.required)] = np.inf
        places = np.empty(len(counts), np.float32)
        places[np.lexsort((np.arange(len(counts)), length, -raised))] = np.arange(len(counts), 0, -1)
        return places

    # -- the cut -------------------------------------------------------------------------------------
    def check(self, kept: Sequence[int]) -> None:
        """Raises InputError if a required token is dropped, or a part of a kept token."""
        stays, names = set(kept), {i: token for token, i in self.tokens.items()}
        if self.required - stays:
            gone = min(self.required - stays)
            raise InputError(
                f"the plan drops token {gone} ({names.get(gone, 'named in the config')!r}), which has to stay: the "
                f"nearest legal vocabulary keeps all {len(self.required)} special tokens, bytes and characters"
            )
        for i in kept:
            lost = self.parts(names[i]) - stays if i in names else None
            if lost:
                raise InputError(
                    f"the plan keeps token {i} ({names[i]!r}) and drops {min(lost)} ({names[min(lost)]!r}), from "
                    "which it is merged; keep both or neither, as a plan by `Vocabulary.scores` does"
                )

    def cut(self, kept: Sequence[int]) -> JsonObject:
        """The tokenizer.json of the tokens `kept`, which are sorted old ids. New ids are positions in `kept`.

        Raises InputError as `check` does.
        """
        self.check(kept)
        new = {old: i for i, old in enumerate(kept)}
        values = json.loads(json.dumps(self.values))
        model = values["model"]
        if self.kind == "BPE":
            model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
            stays = model["vocab"].keys()
            pairs = zip(self._merges(), model["merges"], strict=True)
            model["merges"] = [m for (a, b), m in pairs if a in stays and b in stays and a + b in stays]
        else:
            model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] in self.rows]
        for token in values["added_tokens"]:
            token["id"] = new[token["id"]]
        for part in ("post_processor", "padding"):
            values[part] = _renumbered(values.get(part), {token: new[i] for token, i in self.added.items()}, new)
        return values


def write_tokenizer(tokenizer: JsonObject, kept: Sequence[int], student: Path) -> None:
    """Writes a cut tokenizer into `student`, and the new ids into the configs that were copied there."""
    new = {old: i for i, old in enumerate(kept)}
    write_json(student / "tokenizer.json", tokenizer)
    for _, file in side_files(student, OTHER_VOCABULARIES):
        file.unlink()
    for name in NAMING:
        if (student / name).is_file():
            write_json(student / name, renumbered(read_json(student / name, "the config"), new.get))


def renumbered(value: Json, number: Callable[[int], Json]) -> Json:
    """A config, at any depth, with `number(id)` in place of each id. If that is None, the token is dropped.

    Then its entry of a list or of `added_tokens_decoder` is dropped, and so is a sequence that it is part of. A field
    with such an id becomes null.
    """
    if isinstance(value, list):
        return [renumbered(part, number) for part in value]
    if not isinstance(value, dict):
        return value
    new_config = {}
    for key, part in value.items():
        if key.endswith(IDS):
            new_config[key] = _mapped(part, number)
        elif key == "added_tokens_decoder" and isinstance(part, dict):
            ids = {number(int(i)): token for i, token in part.items()}
            new_config[key] = {str(i): token for i, token in ids.items() if i is not None}
        elif key == "forced_decoder_ids" and isinstance(part, list):
            new_config[key] = [[place, new] for place, i in part if not _lost(i, new := _mapped(i, number))]
        elif key == "sequence_bias" and isinstance(part, list):
            new_config[key] = [[new, bias] for ids, bias in part if not _lost(ids, new := _mapped(ids, number))]
        else:
            new_config[key] = renumbered(part, number)
    return new_config


def _mapped(value: Json, number: Callable[[int], Json]) -> Json:
    """Renumbered ids, at any depth of lists. -1 and null are no ids."""
    if isinstance(value, list):
        return [new for i in value if not _lost(i, new := _mapped(i, number))]
    return number(value) if type(value) is int and value >= 0 else value


def _lost(old: Json, new: Json) -> bool:
    return (new is None and old is not None) or (isinstance(old, list) and len(new) < len(old))


def _renumbered(value: Json, by_text: Mapping[str, int], new: Mapping[int, int]) -> Json:
    """A post-processor or padding with new ids: `ids` lists, `pad_id`, and pairs of a token's text and its id."""
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int and value[0] in by_text:
            return [value[0], by_text[value[0]]]
        return [_renumbered(part, by_text, new) for part in value]
    if not isinstance(value, dict):
        return value
    new_values: JsonObject = {}
    for key, part in value.items():
        if key == "ids" and isinstance(part, list):
            new_values[key] = [new[i] for i in part]
        elif key == "pad_id":
            new_values[key] = new[part]
        else:
            new_values[key] = _renumbered(part, by_text, new)
    return new_values
