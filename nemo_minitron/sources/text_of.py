"""The text model inside a Hugging Face folder of a model that also reads pictures, as a TensorSource.

Such a folder has the text's config in `text_config`, and its tensors behind a prefix. What sees is left out, so the
logits for text alone are the same. `minitron convert` makes a folder of it, which every command reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families import PICTURES, read_config, read_json_config
from nemo_minitron.sources.folder import HFSource
from nemo_minitron.sources.headers import Entry

# A prefix of the text's tensors -> the prefix in a folder of the text. The hub's files have the first, files that
# transformers writes since 4.52 the second; `lm_head.weight` has none there.
TEXT = {"language_model.": "", "model.language_model.": "model.", "lm_head.": "lm_head."}
SIGHT = ("vision_tower.", "multi_modal_projector.")
# What transformers reads beside `text_config`, whatever is in it: the ends of a generated text (a chat model's turns
# have one of their own), and in transformers 5, which always writes it there, whether the head is tied.
OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


class TextSource(HFSource):
    """The text of a model that reads pictures, too. Raises InputError as HFSource does."""

    def read_config(self) -> JsonObject:
        return read_config(text_config(self.folder))

    def stored(self) -> dict[str, Entry]:
        return text_tensors(super().stored())


def reads_pictures(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model that reads pictures, and whose text is supported."""
    return (folder / "config.json").is_file() and _class_of(read_json_config(folder)) in PICTURES


def text_config(folder: Path) -> JsonObject:
    """The config of the text alone. Raises InputError if the folder's config has none."""
    config = read_json_config(folder)
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise InputError(f"the config of '{folder}' has the text_config {text!r}; it must be a mapping")
    outer = {key: config[key] for key in OUTER if config.get(key) is not None}
    return {**text, **outer, "architectures": [PICTURES[_class_of(config)]]}


def text_tensors(stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """The text's tensors by the names that a folder of the text has; those of the picture tower are left out."""
    found = dict[str, Entry]()
    for name, entry in stored.items():
        if name.removeprefix("model.").startswith(SIGHT):
            continue
        prefix = next((prefix for prefix in TEXT if name.startswith(prefix)), "")
        found[TEXT[prefix] + name.removeprefix(prefix) if prefix else name] = entry
    return found


def _class_of(config: JsonObject) -> str:
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else ""
