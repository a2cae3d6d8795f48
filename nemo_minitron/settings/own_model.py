"""What `minitron compress MODEL` is told about a user's own model; `job/own_model.py` derives the rest."""

from __future__ import annotations

import dataclasses

from nemo_minitron.schema import MODEL, TOKENS, setting
from nemo_minitron.settings.validated import ValidatedSettings

TEXT = "Text of your own MODEL's job: a file, a .bin/.idx prefix, or a `datasets` source."
TEST = "Held-out text. Default: the test split, or every twentieth document of files."
FIELD = "Name of the text in records or columns, e.g. body. Default: text, or chat messages."
SHARE = "Size of your own MODEL's student: 84M, or 0.7x of the model's parameters."
MEMORY = "Size of the student by the bytes of its weights, e.g. 8GiB."
KEEP = "Sizes of the student, e.g. ffn=1024,layers=24, or layers that stay: layers=0+1+3-7."
TRAINED = "Tokens that the student learns; 0: 100M on GPUs, 200k without."


@dataclasses.dataclass(frozen=True)
class OwnModel(ValidatedSettings):
    """A model's text, and how large its student may be. With a recipe none of these is given."""

    data: str = setting("", TEXT, panel=MODEL)
    test: str = setting("", TEST, panel=MODEL)
    field: str = setting("", FIELD, panel=MODEL)
    params: str = setting("", SHARE, panel=MODEL)
    memory: str = setting("", MEMORY, panel=MODEL)
    keep: str = setting("", KEEP, panel=MODEL)
    tokens: int = setting(0, TRAINED, least=0, most=TOKENS, panel=MODEL)

    @property
    def given(self) -> list[str]:
        """The options that were given, as on the command line."""
        values = dataclasses.asdict(self)
        return [f"--{name}={value}" for name, value in values.items() if value]
