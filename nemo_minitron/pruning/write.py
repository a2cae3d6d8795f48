"""A student as Hugging Face safetensors, written in pieces, so that memory does not grow with the model."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import need_space, reserve, write_json
from nemo_minitron.artifacts.json_types import HfConfig, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of
from nemo_minitron.pruning.selection import shapes_of
from nemo_minitron.pruning.student import Student
from nemo_minitron.sources.headers import SIZES
from nemo_minitron.sources.stacks import joined
from nemo_minitron.sources.streams import Sink
from nemo_minitron.sources.tensors import TensorSource, whole

SHARD = 5_000_000_000  # bytes of tensors in a file, Hugging Face's default


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One stored tensor of the student. `parts`: canonical names of what it joins along dimension 0, or, if `turns` is
    not 0, of what it stacks: all experts' tensors, of which so many take turns."""

    name: str
    parts: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    turns: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def write_weights(
    source: TensorSource,
    plan: PrunePlan,
    folder: str | Path,
    config: HfConfig,
    *,
    compensation: Compensation | None = None,
    shard_size: int = SHARD,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes model.safetensors, or shards of up to `shard_size` bytes and their index, into `folder`.

    `config`, the teacher's or the student's, decides the names. Tensors keep the dtype that `source` stores. Tensors of
    `compensation` replace the plan's slices. If there is more than one thread, each of them reads `source`. A tensor
    larger than `shard_size` gets its own shard. `progress(megabytes done, all)` is called after each tensor.

    Raises InputError if the disk is too small (before the first byte is written), for a compensation of another plan,
    for a number that is not finite (NaN or an infinity, in any dtype), and whenever `student_index` does.
    """
    folder, student = Path(folder), Student(source, plan, compensation)
    tensors = _tensors(student, config)
    total = sum(tensor.size for tensor in tensors)
    need_space(folder, total)
    shards = _shards(tensors, shard_size)
    tasks: dict[_Tensor, Callable[[], None]] = {}
    for file, members in shards.items():
        tasks |= _open_shard(folder / file, members, student)
    longest_first = sorted(tasks, key=lambda t: -t.size)  # so that the threads end together
    # If one task fails, map cancels those that have not begun.
    with ThreadPoolExecutor(threads) as pool:
        written = 0
        for tensor, _ in zip(longest_first, pool.map(lambda tensor: tasks[tensor](), longest_first), strict=True):
            written += tensor.size
            progress(written // 10**6, total // 10**6)
    if len(shards) > 1:
        places = {tensor.name: file for file, members in shards.items() for tensor in members}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def _tensors(student: Student, config: HfConfig) -> list[_Tensor]:
    shapes, family = student.architecture.shapes(), family_of(config)
    tensors = []
    for name, parts in family.hf_tensors(student.architecture).items():
        dtypes = {student.dtype(part) for part in parts}
        if len(dtypes) > 1:
            raise InputError(f"'{name}' fuses tensors that are stored as {' and '.join(sorted(dtypes))}")
        shape = family.stored_shape(name, [shapes[part] for part in parts])
        tensors.append(_Tensor(name, parts, dtypes.pop(), shape, family.turns(name)))
    return tensors


def _shards(tensors: Iterable[_Tensor], limit: int) -> dict[str, list[_Tensor]]:
    """File name -> its tensors, in the model's order, as many as fit into a file."""
    # Not huggingface_hub's splitter: it puts a tensor larger than `limit` in front of tensors that come before it.
    groups: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.size for t in groups[-1]) + tensor.size > limit:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{k:05d}-of-{count:05d}.safetensors": group for k, group in enumerate(groups, start=1)}


def _open_shard(file: Path, members: list[_Tensor], student: Student) -> dict[_Tensor, Callable[[], None]]:
    """Writes the header and reserves the file's length. Returns one task a tensor that writes it."""
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    # Wide dtypes come first, so that each element lies at a multiple of its own size.
    for tensor in sorted(members, key=lambda t: -SIZES[t.dtype]):
        end = position + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        starts[tensor], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        reserve(stream.fileno(), 8 + len(text) + position)
    data = 8 + len(text)
    turn = threading.Lock()
    return {t: functools.partial(_fill, file, turn, data + starts[t], t, student) for t in members}


def _fill(file: Path, turn: threading.Lock, position: int, tensor: _Tensor, student: Student) -> None:
    with open(file, "r+b", buffering=0) as stream:
        for at in range(0, len(tensor.parts), tensor.turns) if tensor.turns else ():
            names, shapes = tensor.parts[at : at + tensor.turns], shapes_of(student.architecture)
            sink = Sink(stream.fileno(), position, turn, tensor.dtype, student.origin(names[0]))
            sink.write(joined([student.read(name, whole(shapes[name])) for name in names]))
            position = sink.position
        for part in () if tensor.turns else tensor.parts:
            sink = Sink(stream.fileno(), position, turn, tensor.dtype, student.origin(part))
            student.put(part, sink)
            position = sink.position
