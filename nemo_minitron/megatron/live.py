"""A live Megatron model, in whatever layout, as something to fill and something to read, in canonical terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.artifacts.plan import PrunePlan
from nemo_minitron.backend.collectives import gather_objects
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.selection import student_index
from nemo_minitron.sources.bits import DTYPES, as_raw, as_tensor
from nemo_minitron.sources.finite import check_finite
from nemo_minitron.sources.mapping import Piece, Shard, is_expert, pieces
from nemo_minitron.sources.tensors import RAW, TensorSource, source_digest, whole


def this_shard() -> Shard:
    """Where this rank stands in the groups between which tensors are split."""
    return Shard(
        rank=parallel_state.get_tensor_model_parallel_rank(),
        size=parallel_state.get_tensor_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def named_parameters(chunks: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters under their global names: layers carry their number in the whole model."""
    for chunk in map(unwrap, chunks):
        first = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            for local, number in first.items():
                if name.startswith(local):
                    name = f"decoder.layers.{number}.{name.removeprefix(local)}"
                    break
            yield name, parameter


def _places(chunks: Iterable[Any], architecture: Architecture) -> dict[str, list[tuple[Tensor, Piece]]]:
    """Canonical name -> the places of this rank's parameters where it lies. Raises InputError for FP8 parameters: a
    write of one piece would change the scale of all that is there."""
    found: dict[str, list[tuple[Tensor, Piece]]] = {}
    shard = this_shard()
    for name, parameter in named_parameters(chunks):
        if is_float8tensor(parameter):
            raise InputError(f"'{name}' lies in FP8 and cannot be filled by pieces; build the model without fp8_param")
        for piece in pieces(name, architecture, shard):
            found.setdefault(piece.tensor, []).append((parameter.data, piece))
    return found


@torch.no_grad()
def fill(chunks: Iterable[Any], source: TensorSource, plan: PrunePlan | None = None) -> None:
    """Fills this rank's shards by reading what the plan (or, without one, the identity) gives them.

    No rank holds more of the source than the rows of one tensor. Rows of a padded vocabulary become zero.
    Collective. Raises InputError where a tensor of the model is on no rank, or one on no rank is needed, and for a
    weight that is not finite.
    """
    chunks = list(chunks)
    architecture = plan.target if plan else source.architecture
    places = _places(chunks, architecture)
    _check_total(places, architecture)
    for _, parameter in named_parameters(chunks):
        parameter.data.zero_()
    for name, shape in architecture.shapes().items():
        origin, index = student_index(plan, name) if plan else (name, whole(shape))
        if getattr(source, "collective", False):
            block = source.read(origin, index)  # every rank takes part, also one that needs nothing of it
            for target, piece in places.get(name, ()):
                _copy(block[_slices(piece.box)], source.dtype(origin), origin, target, piece)
            continue
        for target, piece in places.get(name, ()):
            part = tuple(i[first:last] for i, (first, last) in zip(index, piece.box, strict=True))
            _copy(source.read(origin, part), source.dtype(origin), origin, target, piece)


def _copy(raw: np.ndarray, dtype: str, name: str, target: Tensor, piece: Piece) -> None:
    check_finite(raw, dtype, name)
    target[_slices(piece.place)] = as_tensor(raw, dtype).to(target)


def _slices(box: Any) -> tuple[slice, ...]:
    return tuple(slice(first, last) for first, last in box)


def _check_total(places: dict[str, Any], architecture: Architecture) -> None:
    everywhere = gather_objects(set(places), torch.distributed.group.WORLD)
    found, shapes = set().union(*everywhere), architecture.shapes()
    if missing := shapes.keys() - found:
        raise InputError(f"the Megatron model has no parameter for the tensor '{min(missing)}'")
    if surplus := found - shapes.keys():
        raise InputError(f"nothing fills the Megatron model's '{min(surplus)}': the architecture lacks it")


class LiveSource:
    """A live, sharded model as a TensorSource. `read` is collective: every rank of the job calls it alike.

    Parameters that Transformer Engine keeps in FP8 (`fp8_param_gather`) are read as the values that they stand for.
    """

    collective = True

    def __init__(self, chunks: Iterable[Any], architecture: Architecture) -> None:
        chunks = list(chunks)
        self.architecture = architecture
        self._dtype = next(unwrap(chunks[0]).parameters()).dtype
        self._shards = _contributed(chunks, architecture)

    def dtype(self, name: str) -> str:
        return DTYPES[self._dtype]

    @torch.no_grad()
    def read(self, name: str, index: Index) -> np.ndarray:
        """Raw bits of the block, the same on every rank; one rank contributes each element."""
        block = np.zeros([len(i) for i in index], RAW[self.dtype(name)])
        for parameter, piece in self._shards.get(name, ()):
            inside = [np.nonzero((i >= a) & (i < b))[0] for i, (a, b) in zip(index, piece.box, strict=True)]
            local = [
                torch.from_numpy(i[at] - box[0] + place[0])
                for i, at, box, place in zip(index, inside, piece.box, piece.place, strict=True)
            ]
            if all(len(at) for at in inside):
                values = dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter
                block[np.ix_(*inside)] = as_raw(values[torch.meshgrid(*local, indexing="ij")])
        bits = torch.from_numpy(block.reshape(-1).view(np.uint8)).to(torch.cuda.current_device())
        torch.distributed.all_reduce(bits)  # bytes of one owner and zeros: exact, whatever they mean
        return bits.cpu().numpy().view(block.dtype).reshape(block.shape)


def live_digest(chunks: Iterable[Any], architecture: Architecture) -> str:
    """The model digest of a live model. Collective."""
    return source_digest(LiveSource(chunks, architecture))


def _contributed(chunks: list[Any], architecture: Architecture) -> dict[str, list[tuple[Tensor, Piece]]]:
    """The places for which this rank, of all that hold a copy, speaks.

    Copies of an expert lie in its own data-parallel group, which also spans tensor-parallel ranks where experts
    are sharded over fewer of them.
    """
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    expert_copy = parallel_state.get_expert_data_parallel_rank()
    shard, first = this_shard(), parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    found: dict[str, list[tuple[Tensor, Piece]]] = {}
    for name, parameter in named_parameters(chunks):
        if name == "output_layer.weight" and architecture.tied_embeddings and not first:
            continue  # the second copy of a tied embedding
        if expert_copy if is_expert(name) else copy:
            continue
        mine = pieces(name, architecture, shard)
        split_rank = shard.expert.rank if is_expert(name) else shard.rank
        if split_rank and mine == pieces(name, architecture, shard.first):
            continue  # replicated over tensor-parallel ranks
        for piece in mine:
            found.setdefault(piece.tensor, []).append((parameter, piece))
    return found
