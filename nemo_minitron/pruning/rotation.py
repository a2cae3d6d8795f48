"""The teacher in rotated coordinates of its residual stream, so that a cut of hidden channels loses the least of it.

The stream is only read through norms and matrices. RMSNorm divides by the root mean square of the channels, which no
rotation Q changes. So a decoder whose matrices read Q^T x and write Q^T y is the same decoder, once the weights of its
norms stand in the matrices that read them (SliceGPT, 2401.15024). The columns of Q are the principal axes of what the
norms see: the first k of them carry more of the stream than any k of its channels. Here one Q serves the whole model,
so the student is a plain checkpoint, without SliceGPT's matrices between layers.

An output head that is a tensor of its own takes the final norm's weights, too. A tied one cannot, because the embedding
is the same tensor. Then a channel whose final weight is far from the median keeps its own axis. Among the others, whose
weights are within BAND of it, the rotated norm has the diagonal of Q^T w Q; what is beside the diagonal is left out.

Shapes (docs/shapes.md): H hidden channels, O output channels of a matrix, D its input channels.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.artifacts.dtypes import as_numbers, as_stored
from nemo_minitron.axes import owners, split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.rearranged import Another
from nemo_minitron.sources.streams import Sink
from nemo_minitron.sources.tensors import ModelSource, TensorSource

BAND = 0.1  # of a tied model's final norm: SmolLM2 was measured at 0.05, 0.1 and 0.2 (docs/benchmarks.md)
ROWS = 4096  # of a matrix, at a time
EMBEDDING, HEAD, FINAL_NORM = "embedding.weight", "head.weight", "final_norm.weight"
MLP = ("gate", "up", "router", "experts", "shared_expert")  # what stands behind the norm in front of an MLP


def check_rotation(architecture: Architecture) -> None:
    """Raises InputError for a model whose stream cannot be rotated."""
    if architecture.normalization != "rmsnorm":
        raise InputError("a rotation keeps RMSNorm alone; this model has LayerNorm, whose mean it would change")
    if architecture.post_norms:
        raise InputError(
            "this model has norms behind attention and MLP, whose weights scale each channel of what is added to the "
            "stream; a rotation would mix these channels, so leave it off"
        )
    assert not architecture.zero_centered_norms  # only models with such norms have them


@dataclasses.dataclass(frozen=True)
class Rotation:
    """`basis` fp64 [H, H]: a column for each new channel, orthonormal, that of most energy first. `energy` fp64 [H]:
    the mean square of each new channel in front of the norms, as a share of the sum. `mixed`: how many of the old
    channels share axes; each other one is a new channel by itself."""

    basis: np.ndarray
    energy: np.ndarray
    mixed: int

    def kept(self, channels: int) -> float:
        """The share of the stream's energy in the first so many new channels."""
        return float(self.energy[:channels].sum())


def rotation_of(source: TensorSource, covariance: np.ndarray, band: float = BAND) -> Rotation:
    """The principal axes of the stream. `covariance` fp64 [H, H]: the mean of x x^T in front of the norms, each x
    divided by its root mean square. `band`: of a tied model, how far a final norm's weight may be from the median, as a
    share of it, for its channel to share axes with others.

    Raises InputError as `check_rotation`, and for a matrix of another model or with a number that is not finite.
    """
    a = source.architecture
    check_rotation(a)
    if covariance.shape != (a.hidden_size, a.hidden_size):
        raise InputError(f"the stream's covariance is {covariance.shape}; the model has {a.hidden_size} channels")
    if not np.isfinite(covariance).all():
        raise InputError("the stream's covariance holds a number that is not finite; calibrate in fp32")
    mixed = _alike(norm_weight(source, FINAL_NORM), band) if a.tied_embeddings else np.arange(a.hidden_size)
    energies, vectors = np.linalg.eigh(covariance[np.ix_(mixed, mixed)])
    largest = np.abs(vectors).argmax(0)
    vectors *= np.sign(vectors[largest, np.arange(len(mixed))])  # eigh may give either sign
    basis, energy = np.eye(a.hidden_size), np.diag(covariance).copy()
    basis[np.ix_(mixed, mixed)], energy[mixed] = vectors, energies.clip(min=0)
    order = np.argsort(-energy, kind="stable")
    return Rotation(basis[:, order], energy[order] / energy.sum(), len(mixed))


def _alike(weight_H: np.ndarray, band: float) -> np.ndarray:
    """The channels whose weight differs from the median by at most so much of it; the median is one of the weights."""
    middle = np.quantile(weight_H, 0.5, method="lower")
    return np.flatnonzero(np.abs(weight_H - middle) <= band * np.abs(middle))


def norm_weight(source: TensorSource, name: str) -> np.ndarray:
    """What a norm multiplies its channels by, fp64 [H]."""
    return as_numbers(source.read(name, (np.arange(source.architecture.hidden_size),)), source.dtype(name))


class Rotated(Another):
    """The same model with rotated hidden channels; a norm of a layer has one weight for all of them. Each number is
    computed in float64 and rounded once to the stored dtype.

    Raises InputError as `check_rotation`.
    """

    def __init__(self, source: ModelSource, rotation: Rotation) -> None:
        check_rotation(source.architecture)
        super().__init__(source)
        self.basis_HH = rotation.basis

    def read(self, name: str, index: Index) -> np.ndarray:
        dim = hidden_dim(name)
        if dim is None:
            return self.source.read(name, index)
        if "norm" in name:
            return as_stored(self._norm(name)[index[0]], self.dtype(name))
        every = list(index)
        every[dim] = np.arange(self.architecture.hidden_size)
        values = as_numbers(self.source.read(name, tuple(every)), self.dtype(name))
        axes = self.basis_HH[:, index[dim]]
        if dim == 0:
            return as_stored(axes.T @ values, self.dtype(name))
        if norm := norm_before(name, self.architecture):
            weight_H = norm_weight(self.source, norm)
            values *= weight_H / _length(weight_H)
        return as_stored(values @ axes, self.dtype(name))

    def stream(self, name: str, index: Index, sink: Sink) -> None:
        """Writes the outer product of sorted indices, a few rows at a time where a row is one of the model's."""
        step = len(index[0]) if hidden_dim(name) == 0 else ROWS
        for first in range(0, len(index[0]), step):
            sink.write(self.read(name, (index[0][first : first + step], *index[1:])))

    def _norm(self, name: str) -> np.ndarray:
        """The weight of a norm, fp64 [H]."""
        weight_H = norm_weight(self.source, name)
        if name != FINAL_NORM or not self.architecture.tied_embeddings:
            return np.full(self.architecture.hidden_size, _length(weight_H))
        return np.square(self.basis_HH).T @ weight_H


def _length(weight_H: np.ndarray) -> float:
    """The root mean square of a norm's weights: one number in their place leaves the matrices behind it as large as
    they were, and so an optimizer's step."""
    return float(np.sqrt(np.square(weight_H).mean()))


def hidden_dim(name: str) -> int | None:
    """The dimension of a canonical tensor that has the hidden channels; None if it has none."""
    return next((row.dim for cut, row in owners(name) if cut.name == "hidden"), None)


def norm_before(name: str, architecture: Architecture) -> str | None:
    """The norm whose output a matrix reads; None for the embedding, and for a head that is the same tensor."""
    layer, local = split_name(name)
    if layer is None:
        return FINAL_NORM if name == HEAD else None
    behind_mlp_norm = split_expert(local)[1].split(".")[0] in MLP and not architecture.hybrid_pattern
    return f"layers.{layer}.{'pre_mlp' if behind_mlp_norm else 'input'}_norm.weight"
