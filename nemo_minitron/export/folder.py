"""Completes a student's folder: checks its weights and copies the base's tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.parse import anything, grouped, mapped, text
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, from_hf, read_config
from nemo_minitron.families.side_files import SETTINGS, TOKENIZER, copy_side_file, side_files
from nemo_minitron.sources.headers import read_header

INDEX = grouped({"weight_map": mapped(text())})
TIED = "lm_head.weight"  # some folders store a tied head too


def finish_folder(folder: str | Path, *, base_folder: str | Path) -> list[str]:
    """Copies the files that the student lacks (tokenizer, generation config) from the base; returns the names of all
    files.

    Raises InputError, which names the file or the tensor, if weights are missing or have another shape than config.json
    says, or if a tokenizer file differs from the base's although the vocabulary is the same.
    """
    folder, base = Path(folder), Path(base_folder)
    architecture = from_hf(folder)
    check_weights(folder, architecture)
    same_vocabulary = architecture.vocab_size == from_hf(base).vocab_size
    for name, file in side_files(base, TOKENIZER):
        _take_tokenizer_file(folder / name, file, same_vocabulary)
    for name, file in side_files(base, SETTINGS):
        if not (folder / name).exists():
            copy_side_file(file, folder / name)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _take_tokenizer_file(student_file: Path, base: Path, same_vocabulary: bool) -> None:
    if not student_file.exists():
        if not same_vocabulary:
            raise InputError(
                f"the student has another vocabulary than its base, but no '{student_file.name}' of its own"
            )
        copy_side_file(base, student_file)
    elif same_vocabulary and student_file.read_bytes() not in (base.read_bytes(), _as_copied(base)):
        raise InputError(
            f"the student's '{student_file.name}' differs from the base's, but the vocabulary does not; copy it from "
            f"'{base.parent}'"
        )


def _as_copied(file: Path) -> bytes:
    """The bytes of a copy of the file, which may differ: `copy_side_file` removes references to code."""
    with apart() as scratch:
        copy_side_file(file, scratch / file.name)
        return (scratch / file.name).read_bytes()


def check_weights(folder: Path, architecture: Architecture) -> None:
    """Raises InputError unless the folder has exactly the tensors that its config needs, in their shapes."""
    stored = stored_shapes(folder)
    shapes = architecture.shapes()
    expected = {}
    family = family_of(read_config(folder))
    for name, parts in family.hf_tensors(architecture).items():
        expected[name] = family.stored_shape(name, [shapes[part] for part in parts])
    for name, shape in expected.items():
        if name not in stored:
            raise InputError(f"the student '{folder}' lacks the tensor '{name}'")
        if stored[name] != shape:
            raise InputError(f"the student's '{name}' is {stored[name]}; its config.json says {shape}")
    extra = stored.keys() - expected.keys() - ({TIED} if architecture.tied_embeddings else set())
    if extra:
        raise InputError(f"the student '{folder}' has a tensor that its config.json does not mention: '{min(extra)}'")


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, from the headers of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"the student '{folder}' has no safetensors file")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(read_json(index, "the index", INDEX)["weight_map"].values())
        missing = named - {file.name for file in files}
        if missing:
            raise InputError(f"the student '{folder}' lacks the shard '{min(missing)}'")
        files = [file for file in files if file.name in named]
    return {name: shape for file in files for name, shape in _shapes_in(file).items()}


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in read_header(file).items()}


def dtype_of(folder: Path) -> str:
    """torch's name of the dtype that most of a folder's weights have."""
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for entry in read_header(file).values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
    most = max(sizes, key=lambda name: sizes[name], default="")
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(most, most)


def has_chat_template(folder: Path) -> bool:
    """Whether a folder's tokenizer has a chat template, in its config or in a file of its own."""
    config = folder / "tokenizer_config.json"
    inside = config.is_file() and bool(
        read_json(config, "the tokenizer's config", mapped(anything())).get("chat_template")
    )
    return inside or (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file()
