"""A student's folder: is it complete, and does it carry the base's tokenizer?"""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.parse import grouped, mapped, text
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, from_hf, read_config
from nemo_minitron.families.side_files import SETTINGS, TOKENIZER, copy_side_file, side_files

INDEX = grouped({"weight_map": mapped(text())})
TIED = "lm_head.weight"  # some folders store a tied head too


def finish_folder(folder: str | Path, *, base_folder: str | Path) -> list[str]:
    """Copies what the base has and the student lacks (tokenizer, generation config); names of all its files.

    Raises InputError, naming the file or the tensor, where weights are missing or have another shape than
    config.json says, and where a tokenizer file differs from the base's although the vocabulary is the same.
    """
    folder, base = Path(folder), Path(base_folder)
    architecture = from_hf(folder)
    _check_weights(folder, architecture)
    same_vocabulary = architecture.vocab_size == from_hf(base).vocab_size
    for name, file in side_files(base, TOKENIZER):
        _take_tokenizer_file(folder / name, file, same_vocabulary)
    for name, file in side_files(base, SETTINGS):
        if not (folder / name).exists():
            copy_side_file(file, folder / name)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _take_tokenizer_file(own: Path, base: Path, same_vocabulary: bool) -> None:
    if not own.exists():
        if not same_vocabulary:
            raise InputError(f"the student has another vocabulary than its base and no '{own.name}' of its own")
        copy_side_file(base, own)
    elif same_vocabulary and own.read_bytes() not in (base.read_bytes(), _as_copied(base)):
        raise InputError(
            f"the student's '{own.name}' is not the base's although the vocabulary is; copy it from '{base.parent}'"
        )


def _as_copied(file: Path) -> bytes:
    with apart() as scratch:
        copy_side_file(file, scratch / file.name)
        return (scratch / file.name).read_bytes()


def _check_weights(folder: Path, architecture: Architecture) -> None:
    """Every tensor that the config speaks of is there, in its shape, and no other."""
    found = stored_shapes(folder)
    shapes = architecture.shapes()
    expected = {}
    for name, parts in family_of(read_config(folder)).hf_tensors(architecture).items():
        first, rest = shapes[parts[0]][0], shapes[parts[0]][1:]
        expected[name] = (first + sum(shapes[part][0] for part in parts[1:]), *rest)
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"the student '{folder}' lacks the tensor '{name}'")
        if found[name] != shape:
            raise InputError(f"the student's '{name}' is {found[name]}; its config.json says {shape}")
    extra = found.keys() - expected.keys() - ({TIED} if architecture.tied_embeddings else set())
    if extra:
        raise InputError(f"the student '{folder}' has a tensor that its config.json does not speak of: '{min(extra)}'")


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape of a folder's safetensors, from the files' headers alone."""
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
    return {name: shape for file in files for name, shape in _header(file).items()}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"'{file}' is no whole safetensors file ({error})") from None
