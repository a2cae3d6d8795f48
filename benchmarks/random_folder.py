"""A Hugging Face folder of a random model: weights of a normal distribution of variance 1 / hidden_size, so that logits
differ at any size; norms of ones; in bf16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

SHARD = 4 << 30  # bytes
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*")


def random_folder(folder: Path, config: dict[str, Any], device: str = "cpu") -> Path:
    """Writes a model of this config, with the demo's tokenizer. The device draws the numbers: a GPU draws 8B in
    seconds, so that the disk alone takes time."""
    import torch
    from safetensors.torch import save_file

    from nemo_minitron.families import family_of

    architecture = family_of(config).architecture(config)
    shapes = architecture.shapes()
    tensors = {name: shapes[part] for name, (part,) in family_of(config).hf_tensors(architecture).items()}
    generator = torch.Generator(device).manual_seed(1)
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for number, names in enumerate(shards(tensors), 1):
        file, content = f"model-{number:05d}.safetensors", {}
        for name in names:
            drawn = torch.ones(tensors[name], dtype=torch.bfloat16, device=device)
            if "norm" not in name:
                drawn.normal_(0.0, config["hidden_size"] ** -0.5, generator=generator)
            content[name] = drawn.cpu()
        save_file(content, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    for file in (file for pattern in TOKENIZER for file in common.MODEL.glob(pattern)):
        shutil.copy(file, folder)
    return folder


def shards(tensors: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The names of the tensors of each file."""
    names, size = [], 0
    for name, shape in tensors.items():
        count = 2
        for length in shape:
            count *= length
        if names and size + count > SHARD:
            yield names
            names, size = [], 0
        names, size = [*names, name], size + count
    yield names
