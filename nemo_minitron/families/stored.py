"""The tensors that a family stores in a Hugging Face folder: their names, their shapes, and what each one holds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.errors import InputError

_LAYER = re.compile(r"layers\.\d+\.")
LLAMA_TENSORS: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("embedding.weight",),
    "model.layers.{i}.input_layernorm.weight": ("layers.{i}.input_norm.weight",),
    "model.layers.{i}.self_attn.q_proj.weight": ("layers.{i}.q.weight",),
    "model.layers.{i}.self_attn.k_proj.weight": ("layers.{i}.k.weight",),
    "model.layers.{i}.self_attn.v_proj.weight": ("layers.{i}.v.weight",),
    "model.layers.{i}.self_attn.o_proj.weight": ("layers.{i}.o.weight",),
    "model.layers.{i}.post_attention_layernorm.weight": ("layers.{i}.pre_mlp_norm.weight",),
    "model.layers.{i}.mlp.gate_proj.weight": ("layers.{i}.gate.weight",),
    "model.layers.{i}.mlp.up_proj.weight": ("layers.{i}.up.weight",),
    "model.layers.{i}.mlp.down_proj.weight": ("layers.{i}.down.weight",),
    "model.norm.weight": ("final_norm.weight",),
    "lm_head.weight": ("head.weight",),
}


def biases(*tensors: str) -> dict[str, tuple[str, ...]]:
    """Hugging Face name -> canonical name, for the biases of the given `tensors` (q, k, v, o, gate, up, down) in
    Llama's modules."""
    weights = {f"layers.{{i}}.{tensor}.weight" for tensor in tensors}
    return biases_of(name for name, (part,) in LLAMA_TENSORS.items() if part in weights)


def biases_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Hugging Face name -> canonical name, for the biases of these weights of LLAMA_TENSORS."""
    pairs = {name: LLAMA_TENSORS[name][0] for name in names}
    return {name.replace(".weight", ".bias"): (part.replace(".weight", ".bias"),) for name, part in pairs.items()}


class Stored:
    """The half of a Family that says what is stored. Class attributes are the tables."""

    hf_class: ClassVar[str]
    tensors: ClassVar[Mapping[str, tuple[str, ...]]] = LLAMA_TENSORS
    """Hugging Face name -> the canonical tensors that it holds, one after another along dimension 0; `{i}` is a
    layer's number, `{e}` an expert's."""
    stacks: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Hugging Face name of a tensor that holds all experts of a layer -> the canonical tensors of one expert. Each is
    transposed, and their outputs take turns (`sources/stacks.py`)."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Another Hugging Face name -> the name in `tensors`."""
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    """Endings of Hugging Face names that hold no weights."""

    def hf_tensors(self, architecture: Architecture) -> dict[str, tuple[str, ...]]:
        """Hugging Face name -> canonical names, for the whole model, in the model's order.

        The mapping is total: InputError is raised if a canonical tensor has no Hugging Face name.
        """
        shapes = architecture.shapes()
        names: dict[str, tuple[str, ...]] = {}
        every = range(architecture.num_moe_experts or 0)
        for pattern, parts in {**self.tensors, **self.stacks}.items():
            layers = range(architecture.num_layers if "{i}" in pattern else 1)
            inside = every if pattern in self.stacks else range(1)
            for i, e in itertools.product(layers, every if "{e}" in pattern else range(1)):
                canonical = tuple(part.format(i=i, e=e + k) for k in inside for part in parts)
                if all(part in shapes for part in canonical):
                    names[pattern.format(i=i, e=e)] = canonical
        missing = shapes.keys() - {part for parts in names.values() for part in parts}
        if missing:
            raise InputError(f"{self.hf_class} has no name for the tensor '{min(missing)}'")
        order = {name: position for position, name in enumerate(shapes)}
        return dict(sorted(names.items(), key=lambda item: order[item[1][0]]))

    def turns(self, name: str) -> int:
        """How many canonical tensors of an expert take turns in a stored tensor of all experts; 0 in another one."""
        return len(self.stacks.get(_LAYER.sub("layers.{i}.", name), ()))

    def stored_shape(self, name: str, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of a Hugging Face tensor of canonical tensors of these shapes."""
        rows, *rest = parts[0]
        if turns := self.turns(name):
            return (len(parts) // turns, *rest, turns * rows)
        return (sum(part[0] for part in parts), *rest)

    def packed(self, config: HfConfig) -> bool:
        """Whether the folder of this config has its stacks in MXFP4."""
        return False
