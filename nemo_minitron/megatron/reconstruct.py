"""Cut MLPs fitted as a whole, from the least squares on, by passes over the calibration (2510.14444 calls it local
reconstruction).

Each MLP of the student reads what the teacher's MLP reads, and learns by Adam to write what the teacher's writes. A
token's squared error counts by one over the mean square of the teacher's residual stream behind the layer, as the next
norm sees it. The MLPs do not depend on each other. Each lies on the ranks that hold the teacher's, in the same layout:
tensor parallelism splits it as Megatron does, gradients are summed over data- and context-parallel ranks, and each
pipeline stage fits its own. One step takes `reconstruct_batch` rows of all ranks together. Rows at the beginning are
held out: an MLP that is no better on them afterwards keeps what it started from.

Shapes (docs/shapes.md): S positions of the sequence on this rank, B sequences, H hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.importance.batches import Batch, micro_batches
from nemo_minitron.importance.forward import evaluating, run_forward
from nemo_minitron.importance.samples import Samples, samples_of
from nemo_minitron.settings.reconstruction import held_out

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch.distributed import ProcessGroup
    from torch.utils.hooks import RemovableHandle

    from nemo_minitron.settings.orders import CompensateOrder

RATE = 0.01  # Adam's highest rate, as a share of a matrix's root mean square: 2e-3 for SmolLM2's (docs/benchmarks.md)
WARMUP = 0.05  # of the steps; then the rate falls to 0 as a cosine
MEASURE, LEARN = "measure", "learn"


class MLPFit:
    """One MLP of the student, its optimizer, and its error on the held-out rows before and after."""

    def __init__(self, mlp: nn.Module, steps: int) -> None:
        self.mlp, self.steps, self.step = mlp, steps, 0
        self.errors: list[Tensor] = []
        mlp.requires_grad_(False)
        self.weights = [weight.requires_grad_() for weight in mlp.parameters() if weight.dim() == 2]
        self.start = [weight.detach().clone() for weight in self.weights]
        self.rates = [RATE * _root_mean_square(weight) for weight in self.weights]
        groups = [{"params": [weight], "lr": 0.0} for weight in self.weights]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)

    def error(self, x_SBH: Tensor, aim_SBH: Tensor, share_SB: Tensor) -> Tensor:
        """The sum of this rank's squared errors, each times its share."""
        written_SBH, _ = self.mlp(x_SBH)
        return ((written_SBH.float() - aim_SBH).square().mean(-1) * share_SB).sum()

    def learn(self, x_SBH: Tensor, aim_SBH: Tensor, share_SB: Tensor) -> None:
        with torch.enable_grad():
            self.error(x_SBH, aim_SBH, share_SB).backward()
        done, self.step = (self.step + 0.5) / self.steps, self.step + 1
        rate = min(done / WARMUP, 0.5 + 0.5 * math.cos(math.pi * done))
        for weight, group, own in zip(self.weights, self.optimizer.param_groups, self.rates, strict=True):
            torch.distributed.all_reduce(weight.grad, group=_copies())
            group["lr"] = rate * own
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, x_SBH: Tensor, aim_SBH: Tensor, share_SB: Tensor) -> None:
        self.errors[-1] += self.error(x_SBH, aim_SBH, share_SB).double()

    def settle(self, split: bool) -> tuple[float, float]:
        """Puts the start back if the fit is no better. The errors before and after, the same on all ranks of the MLP.
        `split`: sequence parallelism shares the positions out."""
        errors = torch.stack(self.errors)
        torch.distributed.all_reduce(errors, group=_copies())
        if split:
            torch.distributed.all_reduce(errors, group=parallel_state.get_tensor_model_parallel_group())
        before, after = errors.tolist()
        if not after < before:
            for weight, start in zip(self.weights, self.start, strict=True):
                weight.detach().copy_(start)
        return before, after


class Reconstruction:
    """Hooks on the teacher's layers: while it is open, each micro-batch that passes the teacher fits or measures."""

    def __init__(
        self, teacher: Sequence[MegatronModule], student: Sequence[MegatronModule], layers: Collection[int], steps: int
    ) -> None:
        both = zip(teacher, student, strict=True)
        pairs = [pair for t, s in both for pair in _mlps(unwrap(t), unwrap(s)) if pair[0].layer_number - 1 in layers]
        self.fits = {layer.layer_number - 1: MLPFit(mlp, steps) for layer, mlp in pairs}
        self.split = bool(unwrap(teacher[0]).config.sequence_parallel)
        self.mode, self._layers = MEASURE, [layer for layer, _ in pairs]
        self._handles: list[RemovableHandle] = []
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> what its MLP has just read and written
        self._samples: Samples | None = None

    def __enter__(self) -> Reconstruction:
        for layer in self._layers:
            number = layer.layer_number - 1
            self._handles.append(layer.mlp.register_forward_hook(self._keep(number)))
            self._handles.append(layer.register_forward_hook(self._use(number)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def expect(self, batch: Mapping[str, Tensor], first: bool = True) -> None:
        self._samples = samples_of(batch) if batch["loss_mask"].any() else None  # None: it fills the schedule up

    def _keep(self, number: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            # a copy: without gradients Megatron adds the residual stream to it in place
            self._seen[number] = args[0].detach().float(), output[0].detach().to(torch.float32, copy=True)

        return hook

    def _use(self, number: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            x_SBH, aim_SBH = self._seen.pop(number)
            if self._samples is not None:
                stream_SBH = (output[0] if isinstance(output, tuple) else output).detach().float()
                getattr(self.fits[number], self.mode)(x_SBH, aim_SBH, self._shares(stream_SBH))

        return hook

    def _shares(self, stream_SBH: Tensor) -> Tensor:
        """What each position's squared error is multiplied by: 0 where it does not count."""
        assert self._samples is not None
        share_SB = 1 / stream_SBH.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
        ids_SB = self._samples.places(self.split)
        return share_SB if ids_SB is None else share_SB * (ids_SB >= 0)


def reconstruct(
    order: CompensateOrder, teacher: Sequence[MegatronModule], student: Sequence[MegatronModule], rows: Tensor,
    layers: Collection[int], report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, tuple[float, float]]:  # fmt: skip
    """Fits the MLPs of `student`, fp32, in place. Collective.

    `rows`: the calibration's, int64 [rows, sequence_length], the same on every rank. `layers`: the teacher's layers
    that stay, from 0. Gives such a layer -> the error on the held-out rows before and after, for this rank's stage.
    """
    batch, passes = order.reconstruct_batch, order.reconstruct
    aside = held_out(len(rows), batch)
    steps = (len(rows) - aside) // batch
    config, virtual = unwrap(teacher[0]).config, len(teacher) > 1
    held, learn = (
        micro_batches(_of_rank(part, batch), config, virtual=virtual)
        for part in (rows[:aside], rows[aside : aside + steps * batch])
    )
    with evaluating(teacher), torch.no_grad(), Reconstruction(teacher, student, layers, steps * passes) as fitting:
        _measure(fitting, teacher, held)
        fitting.mode = LEARN
        for done in range(passes):
            run_forward(list(teacher), learn, fitting)
            report(done + 1, passes)
        fitting.mode = MEASURE
        _measure(fitting, teacher, held)
    return {layer: fit.settle(fitting.split) for layer, fit in fitting.fits.items()}


def _measure(fitting: Reconstruction, teacher: Sequence[MegatronModule], held: list[Batch]) -> None:
    for fit in fitting.fits.values():
        fit.errors.append(torch.zeros((), dtype=torch.float64, device=fit.weights[0].device))
    run_forward(list(teacher), held, fitting)


def _of_rank(rows: Tensor, batch: int) -> list[Tensor]:
    """This data-parallel rank's share of each step's rows."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [step.chunk(ranks)[rank] for step in rows.split(batch)]


def _mlps(teacher: nn.Module, student: nn.Module) -> Iterator[tuple[TransformerLayer, nn.Module]]:
    """Each of the teacher's layers that has a dense MLP, with the student's MLP of the same layer."""
    for layer, own in zip(teacher.decoder.layers, student.decoder.layers, strict=True):
        if isinstance(getattr(layer, "mlp", None), MLP):
            yield layer, own.mlp


def _copies() -> ProcessGroup:
    """The ranks that hold a copy of a matrix and see other tokens."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _root_mean_square(weight: Tensor) -> float:
    """Of the whole matrix, over the tensor-parallel ranks that share it."""
    sums = torch.stack(
        [weight.detach().double().square().sum(), torch.full_like(weight[0, 0], weight.numel()).double()]
    )
    torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    return float((sums[0] / sums[1]).sqrt())
