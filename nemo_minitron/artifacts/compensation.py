"""Compensation: what the student has beyond the plan's slices, in a file of its own beside the plan: tensors that were
re-fitted after the cut, and factors of tensors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts.files import atomic_file, parse_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.parse import anything, checked, grouped, mapped, number, text, whole
from nemo_minitron.artifacts.plan import PrunePlan
from nemo_minitron.errors import InputError

VERSION, SCALED = 1, 2  # without and with scales: an older program must refuse what it would leave out
HEADER = grouped({"version": whole(), "plan": text(), "notes": mapped(anything())}, {"scales": mapped(number())})


@dataclasses.dataclass
class Compensation:
    """Tensors that replace the plan's slices of the same name.

    `tensors`: the student's canonical names -> fp32 in the student's global shapes; they are rounded to the dtype that
    the teacher stores. `plan`: digest of the plan that they belong to. `notes`: what made them (method, tokens); the
    notes are not part of their identity. `scales`: canonical name -> what the student's tensor (of `tensors`, or the
    plan's slice) is multiplied by, before it is rounded.
    """

    plan: str
    tensors: Mapping[str, np.ndarray]
    notes: JsonObject = dataclasses.field(default_factory=dict)
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def check(self, plan: PrunePlan) -> None:
        """Raises InputError if it was made for another plan, or has a tensor that the student lacks, and for a scale
        that is not finite and above 0."""
        if self.plan != plan.digest:
            raise InputError("the compensation was made for another plan; run minitron compensate again with this plan")
        shapes = plan.target.shapes()
        for name, shape in self.shapes().items():
            if shapes.get(name) != shape:
                raise InputError(
                    f"the compensation's '{name}' is {shape}, the student's is {shapes.get(name, 'not there')}"
                )
        for name, scale in self.scales.items():
            if name not in shapes:
                raise InputError(f"the compensation scales '{name}', which the student does not have")
            if not (scale > 0 and math.isfinite(scale)):
                raise InputError(f"the compensation's scale of '{name}' is {scale}; it must be above 0 and finite")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor; reads no tensor."""
        return _shapes(self.tensors)

    def joined(self, tensors: Mapping[str, np.ndarray], notes: JsonObject) -> Compensation:
        """This compensation with more `tensors`; their names must be new."""
        assert not tensors.keys() & self.tensors.keys()
        both: ChainMap[str, np.ndarray] = ChainMap(tensors, self.tensors)  # type: ignore[arg-type]  # it is only read
        return dataclasses.replace(self, tensors=both, notes=self.notes | notes)

    def save(self, path: str | Path) -> None:
        """Raises InputError for a number that is not finite."""
        header: JsonObject = {"version": VERSION, "plan": self.plan, "notes": self.notes}
        if self.scales:
            header |= {"version": SCALED, "scales": dict(self.scales)}
        with atomic_file(path) as temporary:
            _write(Path(temporary), self, {"compensation": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Compensation:
        """Reads the header; each tensor is read on access. Raises InputError if the file holds no compensation."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise InputError(f"the compensation '{path}' does not exist")
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = checked(parse_json((file.metadata() or {})["compensation"]), HEADER, "its header")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                dtypes = {piece.get_dtype() for piece in slices.values()}
                shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
            if header["version"] not in (VERSION, SCALED) or dtypes - {"F32"}:
                raise ValueError(f"version {header['version']}, of {' and '.join(sorted(dtypes))}")
            return cls(header["plan"], _Stored(Path(path), shapes), header["notes"], header.get("scales", {}))
        except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"'{path}' is not a compensation of version {VERSION} or {SCALED} ({error})") from None


class Lazy(Mapping[str, np.ndarray]):
    """Tensors that are made or read on access, so that one of them is in memory. A subclass knows their `shapes` and
    makes each."""

    shapes: dict[str, tuple[int, ...]]

    def make(self, name: str) -> np.ndarray:
        """The tensor of a name in `shapes`, fp32."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self.make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Stored(Lazy):
    """The tensors of a file."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.path, self.shapes = path, shapes

    def make(self, name: str) -> np.ndarray:
        from safetensors import safe_open

        with safe_open(str(self.path), framework="numpy") as file:
            return _check_finite(name, file.get_tensor(name))


def _shapes(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    if isinstance(tensors, ChainMap):
        return {name: shape for part in tensors.maps for name, shape in _shapes(part).items()}
    return tensors.shapes if isinstance(tensors, Lazy) else {name: t.shape for name, t in tensors.items()}


def _write(path: Path, compensation: Compensation, metadata: dict[str, str]) -> None:
    """Writes safetensors, a tensor at a time: `safetensors` itself needs all of them in memory."""
    header: JsonObject = {"__metadata__": metadata}
    end = 0
    for name, shape in sorted(compensation.shapes().items()):
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(compensation.shapes()):
            stream.write(_check_finite(name, np.ascontiguousarray(compensation.tensors[name], "<f4")).tobytes())


def _check_finite(name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise InputError(f"the compensation's '{name}' holds a number that is not finite")
    return array
