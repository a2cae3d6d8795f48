"""PrunePlan: which indices of the source stay, as a small JSON file."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import digest_of, read_json, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.parse import anything, checked, grouped, mapped, maybe, text
from nemo_minitron.axes import AXES, Axis, axis
from nemo_minitron.errors import InputError

VERSION = 1
SIZES = mapped(anything(2))
# `keep` has many numbers, so they are checked once, where a plan is made of them
KIND = grouped({"source": SIZES, "target": SIZES, "keep": lambda value: value},
               {"model_digest": maybe(text()), "notes": mapped(anything())})  # fmt: skip
Keep = dict[str, Any]  # axis -> [index] or, for an axis of each layer, {source layer: [index]}


@dataclasses.dataclass
class PrunePlan:
    """A pure selection: sorted kept indices, 0-based, by axis and (where the axis is per layer) source layer.

    `keep["layers"]`, `keep["hidden"]`, `keep["vocab"]`: lists; `keep["experts_per_token"]`: the first so many numbers;
    `keep["ffn"][layer]`, `keep["heads"][layer]`,
    `keep["query_groups"][layer]`, `keep["experts"][layer]`, `keep["shared_expert_ffn"][layer]`,
    `keep["q_latent"][layer]`, `keep["kv_latent"][layer]`,
    `keep["mamba_heads"][layer]`, `keep["mamba_head_dim"][layer]` (the same in each head): lists for each kept
    source layer that has the axis; `keep["expert_ffn"][layer][expert]`: for each kept source expert of it.
    An axis that is not cut is absent.
    `model_digest` is None in a plan made from an Architecture alone. `notes` (where the scores came from)
    are not part of the plan's identity.

    Raises InputError for indices that are out of range, repeated or unsorted, or that do not make `target`.
    """

    source: Architecture
    target: Architecture
    keep: Keep
    model_digest: str | None = None
    notes: JsonObject = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.keep:
            axis(name)
        for name, cut in AXES.items():  # in this order: layers before what is kept of each
            if name in self.keep:
                self._check_axis(cut)
        self._check_sizes(self.source.keep_layers(self.kept_layers))
        with_heads = self.source.attention_layers if {"heads", "query_groups"} & self.keep.keys() else ()
        with_mamba = self.source.mamba_layers if "mamba_heads" in self.keep else ()
        with_experts = self.source.moe_layers if "experts" in self.keep else ()
        for layer in self.kept_layers:
            if layer in with_heads:
                self._check_groups(layer)
            if layer in with_mamba:
                self._check_mamba_groups(layer)
            if layer in with_experts:
                self._check_router_groups(layer)

    @property
    def kept_layers(self) -> list[int]:
        """The source layers that stay, in order."""
        return self.keep["layers"] if "layers" in self.keep else list(range(self.source.num_layers))

    def indices(self, name: str, layer: int | None = None, expert: int | None = None) -> list[int] | None:
        """The kept indices of an axis in a source layer (and source expert); None if all stay."""
        kept, cut = self.keep.get(name), axis(name)
        if kept is None or not cut.per_layer:
            return kept
        return kept[layer][expert] if cut.per_expert else kept[layer]

    @property
    def digest(self) -> str:
        """sha256 of the selection, in hex; the notes do not count."""
        return digest_of({k: v for k, v in self.as_dict().items() if k != "notes"})

    # -- checks --------------------------------------------------------------------------------------
    def _check_axis(self, cut: Axis) -> None:
        if not cut.length(self.source):
            axes_of_source = ", ".join(name for name, other in AXES.items() if other.length(self.source))
            raise InputError(f"the plan cuts '{cut.name}', which the model does not have; it has {axes_of_source}")
        if not cut.ranked and self.keep[cut.name] != list(range(cut.length(self.target))):
            raise InputError(
                f"the plan's '{cut.name}' is {self.keep[cut.name]!r}; the first of them stay, numbered from 0"
            )
        for where, values in self._lists(cut).items():
            _check_indices(where, values, cut.length(self.source), cut.length(self.target))

    def _lists(self, cut: Axis) -> dict[str, list[int]]:
        """Place in words -> its list of kept indices; one entry for each layer or expert that has the axis."""
        kept = self.keep[cut.name]
        if not cut.per_layer:
            return {cut.name: kept}
        stay = set(self.kept_layers)
        layers = [layer for layer in cut.layers_of(self.source) if layer in stay]
        if not isinstance(kept, Mapping) or sorted(kept) != layers:
            raise InputError(f"the plan's '{cut.name}' must have one list for each kept layer that has it: {layers}")
        if not cut.per_expert:
            return {f"{cut.name} of layer {layer}": kept[layer] for layer in layers}
        lists: dict[str, list[int]] = {}
        for layer in layers:
            experts = self.indices("experts", layer) or list(range(self.source.num_moe_experts or 0))
            if not isinstance(kept[layer], Mapping) or sorted(kept[layer]) != experts:
                raise InputError(f"the plan's '{cut.name}' of layer {layer} must have one list for each of {experts}")
            lists |= {f"{cut.name} of layer {layer}, expert {e}": kept[layer][e] for e in experts}
        return lists

    def _check_sizes(self, uncut: Architecture) -> None:
        """Checks the sizes of `target`; `uncut` is the source with only the kept layers."""
        cuttable = {cut.size for cut in AXES.values()}
        for field in sorted(f.name for f in dataclasses.fields(Architecture) if f.name not in cuttable):
            before, after = getattr(uncut, field), getattr(self.target, field)
            if before != after:
                raise InputError(f"a plan cannot change {field}; it leaves {before!r}, and its target says {after!r}")
        for name, cut in AXES.items():
            before, after = cut.length(uncut), cut.length(self.target)
            if name not in self.keep and before != after:
                raise InputError(
                    f"the plan changes {cut.size} from {before} to {after} but keeps no indices of '{name}'"
                )

    def _check_groups(self, layer: int) -> None:
        """Each kept group must keep the same number of heads, and each kept head needs its group."""
        size = self.source.heads_per_group
        groups = self.indices("query_groups", layer)
        heads = self.indices("heads", layer)
        groups = list(range(self.source.num_query_groups)) if groups is None else groups
        if heads is None:
            if self.target.num_query_groups != self.source.num_query_groups:
                raise InputError("a plan that cuts query groups must list the heads that stay")
            return
        counts = {group: sum(head // size == group for head in heads) for group in groups}
        if sum(counts.values()) != len(heads) or set(counts.values()) != {self.target.heads_per_group}:
            raise InputError(
                f"layer {layer} keeps heads {heads}: each kept query group must keep "
                f"{self.target.heads_per_group} of its {size} heads"
            )

    def _check_mamba_groups(self, layer: int) -> None:
        """Each group of Mamba heads, which share B and C, must keep the same number of heads."""
        heads, groups = self.indices("mamba_heads", layer), self.source.mamba_num_groups or 1
        size = (self.source.mamba_num_heads or 0) // groups
        kept = (self.target.mamba_num_heads or 0) // groups
        if heads is not None and any(sum(h // size == g for h in heads) != kept for g in range(groups)):
            raise InputError(
                f"layer {layer} keeps Mamba heads {heads}: each group must keep {kept} of its {size} heads"
            )

    def _check_router_groups(self, layer: int) -> None:
        """Each of a router's groups must keep the same number of experts."""
        experts, groups = self.indices("experts", layer) or [], self.source.moe_router_num_groups or 1
        size, kept = ((a.num_moe_experts or 0) // groups for a in (self.source, self.target))
        if any(sum(expert // size == group for expert in experts) != kept for group in range(groups)):
            raise InputError(
                f"layer {layer} keeps experts {experts}: each of the router's groups must keep {kept} of its {size} "
                "experts"
            )

    # -- files ---------------------------------------------------------------------------------------
    def as_dict(self) -> JsonObject:
        return {
            "version": VERSION,
            "model_digest": self.model_digest,
            "source": self.source.as_dict(),
            "target": self.target.as_dict(),
            "keep": self.keep,
            "notes": self.notes,
        }

    def save(self, path: str | Path) -> None:
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Reads a plan. Raises InputError if the file is not a legal plan."""
        values = read_json(path, "the plan")
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise InputError(f"'{path}' is no prune plan of version {VERSION}")
        values = checked(values, KIND, f"the plan '{path}'")
        try:
            return cls(
                source=Architecture.from_dict(values["source"]),
                target=Architecture.from_dict(values["target"]),
                keep={name: _integer_keys(kept, depth=2) for name, kept in values["keep"].items()},
                model_digest=values.get("model_digest"),
                notes=values.get("notes", {}),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise InputError(f"the plan '{path}' is not legal: {error}") from None
            raise InputError(f"the plan '{path}' is not legal: {type(error).__name__} {error}") from None


def _integer_keys(kept: Any, depth: int) -> Any:
    """Turns the names of layers and experts, which JSON keeps as texts, into numbers; refuses any other spelling."""
    if not isinstance(kept, dict):
        return kept
    if not depth:
        raise InputError("kept indices are nested too deeply; they are listed for each layer and expert")
    by_number = {int(key): _integer_keys(values, depth - 1) for key, values in kept.items()}
    if list(map(str, by_number)) != list(kept):
        raise InputError("layers and experts must be whole numbers, each named once")
    return by_number


def _check_indices(where: str, values: Sequence[int], source: int, target: int) -> None:
    if not isinstance(values, list) or not {int}.issuperset(map(type, values)):
        raise InputError(f"{where}: kept indices must be a list of whole numbers")
    if len(values) != target:
        raise InputError(f"{where}: {len(values)} indices are kept, the target has {target}")
    if any(map(operator.ge, values, values[1:])):
        raise InputError(f"{where}: kept indices must be sorted and none repeated")
    if values[0] < 0 or values[-1] >= source:
        bad = values[0] if values[0] < 0 else values[-1]
        raise InputError(f"{where}: index {bad} is out of range; the source has 0 to {source - 1}")
