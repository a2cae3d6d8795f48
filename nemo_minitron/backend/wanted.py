"""The distributions that work together, a set for each host, and why each is held back. `minitron doctor` shows them.

constraints.txt and constraints-bridge.txt pin one working choice of each set.
"""

from __future__ import annotations

import dataclasses

from nemo_minitron.backend.versions import SETS

NEMO, BRIDGE = "NeMo 2", "Megatron-Bridge"
ENGINE = ">=2.9,<2.13"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A distribution: the versions that work, why, and whether the package runs without it."""

    name: str
    range: str
    why: str
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Set:
    """The distributions of a host, the Pythons that it has releases for, and the containers in which all fit."""

    host: str
    python: Wanted
    wanted: tuple[Wanted, ...]
    containers: tuple[tuple[str, ...], ...]


_TORCH = Wanted("torch", ">=2.6", "grouped-query attention and sharded checkpoints")
_SAFETENSORS = Wanted("safetensors", ">=0.4.5", "Hugging Face folders")
_APEX = Wanted("apex", "", "NVIDIA's, from its containers; the package of that name on the index is another", True)
_MAMBA = (
    Wanted("mamba-ssm", ">=2", "kernels for Mamba-2; without them its scan runs in PyTorch", True),
    Wanted("causal-conv1d", ">=1.4", "mamba-ssm calls it", True),
)
_OF_NEMO, _OF_BRIDGE = SETS["nemo_toolkit"], SETS["megatron-bridge"]
_COLUMNS = ("nvcr.io/nvidia/nemo", "NeMo", "Megatron-core", "Transformer Engine")

SET_OF_NEMO = Set(
    NEMO,
    Wanted("python", ">=3.10,<3.13", "NeMo 2 has no releases for others"),
    (
        _TORCH,
        Wanted("nemo_toolkit", _OF_NEMO["nemo_toolkit"], "3.x has no LLM collection any more"),
        Wanted("megatron-core", _OF_NEMO["megatron-core"], "what NeMo 2.6 and 2.7 were written for"),
        Wanted("nemo_run", ">=0.4", "starts jobs, here and on clusters"),
        Wanted("lightning", ">=2.3", "NeMo's trainer"),
        Wanted("transformers", ">=4.51,<5", "NeMo 2 does not know 5.x"),
        Wanted("datasets", ">=3,<5", "reads text"),
        Wanted("numpy", "<2", "Megatron-core and NeMo pin it"),
        Wanted("pyarrow", "<22", "newer ones need numpy 2, and `import datasets` fails"),
        Wanted("leptonai", "<0.28", "newer ones lack leptonai.api.v1, which NeMo-Run imports"),
        _SAFETENSORS,
        Wanted("transformer-engine", ENGINE, "Megatron-core 0.15 asks for 2.9; fused layers and FP8", True),
        _APEX,
        *_MAMBA,
        Wanted("nvidia-modelopt", "<0.42", "newer ones assert on NeMo 2's wrapped models; a peer, not needed", True),
    ),
    (_COLUMNS, ("25.11 (nearest)", "2.6.0", "0.15.0", "2.9"), ("26.02 (last)", "2.7.0", "0.16.0", "2.12")),
)
SET_OF_BRIDGE = Set(
    BRIDGE,
    Wanted("python", ">=3.12,<3.13", "Megatron-Bridge has no releases for older ones"),
    (
        _TORCH,
        Wanted("megatron-bridge", _OF_BRIDGE["megatron-bridge"], "builds and trains the models"),
        Wanted("megatron-core", _OF_BRIDGE["megatron-core"], "what Megatron-Bridge 0.6 was written for"),
        Wanted("transformers", ">=5.8,<5.13", "what Megatron-Bridge 0.6 was written for"),
        Wanted("datasets", ">=3", "reads text"),
        _SAFETENSORS,
        Wanted("transformer-engine", ">=2.12", "fused layers and FP8", True),
        _APEX,
        *_MAMBA,
    ),
    (_COLUMNS, ("26.06 (nearest)", "none", "0.18", "2.16"), ("26.04", "none", "0.17", "2.14")),
)


SET_OF = {"nemo": SET_OF_NEMO, "bridge": SET_OF_BRIDGE}  # by the name of a host
