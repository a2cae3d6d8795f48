"""Writes and reads the weights of a live Megatron model under their canonical names, in any layout.

Shapes (docs/shapes.md): X the dimensions of a tensor or of a block of it, I the bytes of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

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
from nemo_minitron.pruning.student import Student
from nemo_minitron.sources.bits import DTYPES, as_raw, as_tensor
from nemo_minitron.sources.finite import check_finite
from nemo_minitron.sources.mapping import Piece, Shard, is_expert, pieces
from nemo_minitron.sources.tensors import RAW, TensorSource, source_digest, whole

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


BIAS = "router.expert_bias"  # Megatron's name of it, and its canonical one; it is fp32 in every model


def keep_biases_wide(chunks: Iterable[MegatronModule]) -> None:
    """Makes the routers' correction biases fp32 again, which a model's change of dtype has rounded. Megatron does so in
    the first forward pass, which is too late for one that is filled before it or wrapped after it."""
    for chunk in chunks:
        for module in unwrap(chunk).modules():
            if getattr(module, "expert_bias", None) is not None:
                module.expert_bias = module.expert_bias.float()


def this_shard() -> Shard:
    """This rank's place in the groups that split tensors: tensor, expert and expert-tensor parallelism."""
    return Shard(
        rank=parallel_state.get_tensor_model_parallel_rank(),
        size=parallel_state.get_tensor_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def named_parameters(chunks: Iterable[MegatronModule]) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) of this rank; the routers' correction biases, which are buffers, are among them. Megatron
    numbers the layers of each chunk from 0; here a layer's number is its number in the whole model, from 0."""
    for chunk in map(unwrap, chunks):
        first = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        buffers = [(name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(BIAS)]
        for name, parameter in [*chunk.named_parameters(), *buffers]:
            for local, number in first.items():
                if name.startswith(local):
                    name = f"decoder.layers.{number}.{name.removeprefix(local)}"
                    break
            yield name, parameter


def _places(chunks: Iterable[MegatronModule], architecture: Architecture) -> dict[str, list[tuple[Tensor, Piece]]]:
    """Canonical name -> the parameters of this rank that hold a part of the tensor, each with its piece.

    Raises InputError for a parameter in FP8: to write one piece would change the scale of the whole parameter.
    """
    places: dict[str, list[tuple[Tensor, Piece]]] = {}
    shard = this_shard()
    for name, parameter in named_parameters(chunks):
        if is_float8tensor(parameter):
            raise InputError(f"'{name}' is in FP8 and cannot be filled by pieces; build the model without fp8_param")
        for piece in pieces(name, architecture, shard):
            places.setdefault(piece.tensor, []).append((parameter.data, piece))
    return places


@torch.no_grad()
def fill(chunks: Iterable[MegatronModule], source: TensorSource, plan: PrunePlan | None = None) -> None:
    """Fills this rank's shards of a model by reading `source`; with a `plan`, by reading the parts that it keeps.

    A rank reads only what its shards hold, one tensor at a time. From a collective source (`LiveSource`) it holds one
    whole tensor. Rows that pad the vocabulary become zero. Collective.

    Raises InputError if a tensor of the architecture is on no rank, if a parameter belongs to none of its tensors, and
    for a weight that is not finite.
    """
    chunks = list(chunks)
    source = Student(source, plan) if plan else source
    architecture = source.architecture
    places = _places(chunks, architecture)
    _check_total(places, architecture)
    for _, parameter in named_parameters(chunks):
        parameter.data.zero_()
    for name, shape in architecture.shapes().items():
        index = whole(shape)
        if getattr(source, "collective", False):
            block_X = source.read(name, index)  # every rank must take part, also one that needs nothing of it
            for target, piece in places.get(name, ()):
                _copy(block_X[_slices(piece.box)], source.dtype(name), name, target, piece)
            continue
        for target, piece in places.get(name, ()):
            part = tuple(i[first:last] for i, (first, last) in zip(index, piece.box, strict=True))
            _copy(source.read(name, part), source.dtype(name), name, target, piece)


def _copy(raw_X: np.ndarray, dtype: str, name: str, target_X: Tensor, piece: Piece) -> None:
    """Writes the raw bits of a piece to its place in a parameter, in the parameter's dtype and on its device."""
    check_finite(raw_X, dtype, name)
    target_X[_slices(piece.place)] = as_tensor(raw_X, dtype).to(target_X)


def _slices(box: Iterable[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(first, last) for first, last in box)


def _check_total(places: Iterable[str], architecture: Architecture) -> None:
    """Raises InputError unless the ranks together hold the architecture's tensors and no others. Collective."""
    names_by_rank = gather_objects(set(places), torch.distributed.group.WORLD)
    names, shapes = set().union(*names_by_rank), architecture.shapes()
    if missing := shapes.keys() - names:
        raise InputError(f"the Megatron model has no parameter for the tensor '{min(missing)}'")
    if surplus := names - shapes.keys():
        raise InputError(f"nothing fills the Megatron model's '{min(surplus)}': the architecture lacks it")


class LiveSource:
    """A live, sharded model as a TensorSource. All ranks of the job must call `read` with the same arguments.

    Parameters that Transformer Engine keeps in FP8 (`fp8_param_gather`) are dequantised before they are read.
    """

    collective = True

    def __init__(self, chunks: Iterable[MegatronModule], architecture: Architecture) -> None:
        chunks = list(chunks)
        self.architecture = architecture
        self._dtype = next(unwrap(chunks[0]).parameters()).dtype
        self._shards = _contributed(chunks, architecture)

    def dtype(self, name: str) -> str:
        return DTYPES[torch.float32 if name.endswith(BIAS) else self._dtype]

    @torch.no_grad()
    def read(self, name: str, index: Index) -> np.ndarray:
        """The raw bits of the block that `index` selects, the same on every rank. Collective.

        Exactly one rank contributes each element; the others contribute zeros.
        """
        block_X = np.zeros([len(i) for i in index], RAW[self.dtype(name)])
        for parameter, piece in self._shards.get(name, ()):
            inside = [np.nonzero((i >= a) & (i < b))[0] for i, (a, b) in zip(index, piece.box, strict=True)]
            local = [
                torch.from_numpy(i[at] - box[0] + place[0])
                for i, at, box, place in zip(index, inside, piece.box, piece.place, strict=True)
            ]
            if all(len(at) for at in inside):
                values_X = dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter
                block_X[np.ix_(*inside)] = as_raw(values_X[torch.meshgrid(*local, indexing="ij")])
        bytes_I = torch.from_numpy(block_X.reshape(-1).view(np.uint8)).to(torch.cuda.current_device())
        torch.distributed.all_reduce(bytes_I)  # a sum of one owner's bytes and zeros is exact, whatever they encode
        return bytes_I.cpu().numpy().view(block_X.dtype).reshape(block_X.shape)


def live_digest(chunks: Iterable[MegatronModule], architecture: Architecture) -> str:
    """The digest of a live model's weights, the same as that of its folder or checkpoint. Collective."""
    return source_digest(LiveSource(chunks, architecture))


def _contributed(chunks: list[MegatronModule], architecture: Architecture) -> dict[str, list[tuple[Tensor, Piece]]]:
    """Canonical name -> the parameters that this rank contributes to a `read`, each with its piece. Of all ranks that
    hold a copy of a piece, only one contributes it.

    The copies of an expert lie in its own data-parallel group. That group also spans tensor-parallel ranks if experts
    are sharded over fewer of them.
    """
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    expert_copy = parallel_state.get_expert_data_parallel_rank()
    shard, first = this_shard(), parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    places: dict[str, list[tuple[Tensor, Piece]]] = {}
    for name, parameter in named_parameters(chunks):
        if name == "output_layer.weight" and architecture.tied_embeddings and not first:
            continue  # the second copy of a tied embedding
        if expert_copy if is_expert(name) else copy:
            continue
        rank_pieces = pieces(name, architecture, shard)
        split_rank = shard.expert.rank if is_expert(name) else shard.rank
        if split_rank and rank_pieces == pieces(name, architecture, shard.first):
            continue  # the parameter is replicated over tensor-parallel ranks, and the first of them contributes it
        for piece in rank_pieces:
            places.setdefault(piece.tensor, []).append((parameter, piece))
    return places
