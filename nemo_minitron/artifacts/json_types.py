"""Types of values that come from JSON, or go there.

What such a value may hold depends on its name, which no type can say. A reader checks it with a kind (`parse.py`).
"""

from collections.abc import Mapping
from typing import Any

Json = Any  # any value
JsonObject = dict[str, Any]  # an object
JsonFields = Mapping[str, Any]  # an object that is only read
HfConfig = Mapping[str, Any]  # a model's config.json, as Hugging Face writes it
