"""Sub-blocks that were cut, fitted as a whole, from the least squares on, by passes over the calibration (2510.14444
calls it local reconstruction).

Each sub-block of the student (attention, an MLP, a mixture of experts, a Mamba mixer) reads what the teacher's reads,
and learns by Adam to write what the teacher's writes. A token's squared error counts by one over the mean square of the
teacher's residual stream behind the layer, as the next norm sees it. The sub-blocks do not depend on each other. Each
lies on the ranks that hold the teacher's, in the same layout: tensor and expert parallelism split it as Megatron does,
gradients are summed over the ranks that hold a copy of a matrix and see other tokens, and each pipeline stage fits its
own. One step takes `reconstruct_batch` rows of all ranks together. Rows at the beginning are held out: a sub-block that
is no better on them afterwards keeps what it started from.

Shapes (docs/shapes.md): S positions of the sequence on this rank, B sequences, H hidden channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.importance.batches import Batch, micro_batches
from nemo_minitron.importance.forward import evaluating, run_forward
from nemo_minitron.importance.hooks import Hooks
from nemo_minitron.pruning.reconstruction import SubBlock
from nemo_minitron.settings.reconstruction import held_out
from nemo_minitron.sources.mapping import is_expert

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from torch.distributed import ProcessGroup
    from torch.utils.hooks import RemovableHandle

    from nemo_minitron.settings.orders import CompensateOrder

RATE = 0.01  # Adam's highest rate, as a share of a matrix's root mean square: 2e-3 for SmolLM2's (docs/benchmarks.md)
WARMUP = 0.05  # of the steps; then the rate falls to 0 as a cosine
MEASURE, LEARN = "measure", "learn"
Blocks = Mapping[int, Sequence[SubBlock]]  # the teacher's layer, from 0 -> its sub-blocks that are fitted


class Seen(NamedTuple):
    """What a sub-block of the teacher has just read, as it was called, and what it wrote, fp32."""

    read_SBH: Tensor
    more: tuple[Any, ...]
    named: Mapping[str, Any]
    wrote_SBH: Tensor


class Fit:
    """One sub-block of the student, its optimizer, and its error on the held-out rows before and after.

    `copies`: the ranks that hold the same sub-block and see other tokens."""

    def __init__(self, block: nn.Module, name: str, steps: int) -> None:
        self.block, self.steps, self.step = block, steps, 0
        self.errors: list[Tensor] = []
        block.requires_grad_(False)
        self.matrices = [Matrix(w.requires_grad_(), is_expert(f"{name}.{n}")) for n, w in _matrices(block)]
        groups = [{"params": [matrix.weight], "lr": 0.0} for matrix in self.matrices]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)

    def error(self, seen: Seen, share_SB: Tensor) -> Tensor:
        """The sum of this rank's squared errors, each times its share."""
        written_SBH = self.block(seen.read_SBH, *seen.more, **seen.named)[0]
        return ((written_SBH.float() - seen.wrote_SBH).square().mean(-1) * share_SB).sum()

    def learn(self, seen: Seen, share_SB: Tensor) -> None:
        with torch.enable_grad():
            self.error(seen, share_SB).backward()
        done, self.step = (self.step + 0.5) / self.steps, self.step + 1
        rate = min(done / WARMUP, 0.5 + 0.5 * math.cos(math.pi * done))
        for matrix, group in zip(self.matrices, self.optimizer.param_groups, strict=True):
            matrix.sum_gradients()
            group["lr"] = rate * matrix.rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, seen: Seen, share_SB: Tensor) -> None:
        self.errors[-1] += self.error(seen, share_SB).double()

    def settle(self, split: bool) -> tuple[float, float]:
        """Puts the start back if the fit is no better. The errors before and after, the same on all ranks of the block.
        `split`: sequence parallelism shares the positions out."""
        errors = torch.stack(self.errors)
        torch.distributed.all_reduce(errors, group=_copies())
        if split:
            torch.distributed.all_reduce(errors, group=parallel_state.get_tensor_model_parallel_group())
        before, after = errors.tolist()
        if not after < before:
            for matrix in self.matrices:
                matrix.weight.detach().copy_(matrix.start)
        return before, after


class Matrix:
    """A weight that is fitted, what it started from, and Adam's highest rate for it. `expert`: of a routed expert."""

    def __init__(self, weight: Tensor, expert: bool) -> None:
        self.weight, self.expert, self.start = weight, expert, weight.detach().clone()
        self.rate = RATE * self._root_mean_square()

    def sum_gradients(self) -> None:
        """Over the ranks that hold a copy. An expert to which no token of this rank went has a gradient of 0."""
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        group = parallel_state.get_expert_data_parallel_group() if self.expert else _copies()
        torch.distributed.all_reduce(self.weight.grad, group=group)

    def _root_mean_square(self) -> float:
        """Of the whole matrix, over the tensor-parallel ranks that share it."""
        square, count = self.start.double().square().sum(), torch.tensor(float(self.start.numel())).double()
        sums = torch.stack([square, count.to(square.device)])
        torch.distributed.all_reduce(sums, group=_shares(self.expert))
        return float((sums[0] / sums[1]).sqrt())


class Reconstruction(Hooks):
    """Watches the teacher's layers: while it is open, each micro-batch that passes the teacher fits or measures."""

    def __init__(
        self, teacher: Sequence[MegatronModule], student: Sequence[MegatronModule], wanted: Blocks, steps: int
    ) -> None:
        self.fits: dict[int, dict[str, Fit]] = {}
        self._blocks: list[tuple[int, str, nn.Module]] = []  # layer, name, the teacher's sub-block
        self._layers: list[tuple[int, nn.Module]] = []
        for layer, own in _layers(teacher, student):
            number = layer.layer_number - 1
            for block in wanted.get(number, ()):
                name = f"decoder.layers.{number}.{block.module}"
                self.fits.setdefault(number, {})[block.name] = Fit(getattr(own, block.module), name, steps)
                self._blocks.append((number, block.name, getattr(layer, block.module)))
            self._layers += [(number, layer)] if number in self.fits else []
        self.split = bool(unwrap(teacher[0]).config.sequence_parallel)
        self.mode = MEASURE
        self._seen: dict[tuple[int, str], Seen] = {}
        self._counts = False

    def register(self) -> Iterator[RemovableHandle]:
        for number, name, block in self._blocks:
            yield block.register_forward_hook(self._keep(number, name), with_kwargs=True)
        for number, layer in self._layers:
            yield layer.register_forward_hook(self._use(number))

    def expect(self, batch: Mapping[str, Tensor], first: bool = True) -> None:
        super().expect(batch, first)
        self._counts = bool(batch["loss_mask"].any())  # a micro-batch without tokens fills the schedule up

    def _keep(self, number: int, name: str) -> Callable[[nn.Module, tuple, dict, Any], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            # a copy: without gradients Megatron adds the residual stream to it in place
            wrote_SBH = output[0].detach().to(torch.float32, copy=True)
            self._seen[number, name] = Seen(args[0].detach().float(), args[1:], kwargs, wrote_SBH)

        return hook

    def _use(self, number: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            stream_SBH = (output[0] if isinstance(output, tuple) else output).detach().float()
            for name, fit in self.fits[number].items():
                seen = self._seen.pop((number, name))
                if self._counts:
                    getattr(fit, self.mode)(seen, self._shares(stream_SBH))

        return hook

    def _shares(self, stream_SBH: Tensor) -> Tensor:
        """What each position's squared error is multiplied by: 0 where it does not count."""
        share_SB = 1 / stream_SBH.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
        ids_SB = self.in_hand.places(self.split)
        return share_SB if ids_SB is None else share_SB * (ids_SB >= 0)


def reconstruct(
    order: CompensateOrder, teacher: Sequence[MegatronModule], student: Sequence[MegatronModule], rows: Tensor,
    blocks: Blocks, report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Fits sub-blocks of `student`, fp32, in place. Collective.

    `rows`: the calibration's, int64 [rows, sequence_length], the same on every rank. `blocks`: the teacher's layer,
    from 0 -> its sub-blocks that are fitted. Gives `LAYER NAME` of each sub-block -> its error on the held-out rows
    before and after, for this rank's stage.
    """
    batch, passes = order.reconstruct_batch, order.reconstruct
    aside = held_out(len(rows), batch)
    steps = (len(rows) - aside) // batch
    config, virtual = unwrap(teacher[0]).config, len(teacher) > 1
    held, learn = (
        micro_batches(_of_rank(part, batch), config, virtual=virtual)
        for part in (rows[:aside], rows[aside : aside + steps * batch])
    )
    with contextlib.ExitStack() as stack:
        for chunks in (teacher, student):
            stack.enter_context(evaluating(chunks))
        stack.enter_context(torch.no_grad())
        fitting = stack.enter_context(Reconstruction(teacher, student, blocks, steps * passes))
        _measure(fitting, teacher, held)
        fitting.mode = LEARN
        for done in range(passes):
            run_forward(list(teacher), learn, fitting)
            report(done + 1, passes)
        fitting.mode = MEASURE
        _measure(fitting, teacher, held)
    each = ((f"{layer} {name}", fit) for layer, fits in fitting.fits.items() for name, fit in fits.items())
    return {name: fit.settle(fitting.split) for name, fit in each}


def _measure(fitting: Reconstruction, teacher: Sequence[MegatronModule], held: list[Batch]) -> None:
    for fit in (fit for fits in fitting.fits.values() for fit in fits.values()):
        fit.errors.append(torch.zeros((), dtype=torch.float64, device=fit.matrices[0].weight.device))
    run_forward(list(teacher), held, fitting)


def _of_rank(rows: Tensor, batch: int) -> list[Tensor]:
    """This data-parallel rank's share of each step's rows."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [step.chunk(ranks)[rank] for step in rows.split(batch)]


def _layers(teacher: Sequence[MegatronModule], student: Sequence[MegatronModule]) -> Iterator[tuple[Any, Any]]:
    """Each of the teacher's layers on this rank, with the student's of the same number."""
    for theirs, own in zip(teacher, student, strict=True):
        yield from zip(unwrap(theirs).decoder.layers, unwrap(own).decoder.layers, strict=True)


def _matrices(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that are fitted. A router, also that of a shared expert, stays as it was cut."""
    for name, weight in block.named_parameters():
        if weight.dim() == 2 and "router" not in name and not name.endswith("gate_weight"):
            yield name, weight


def _copies() -> ProcessGroup:
    """The ranks that hold a copy of a matrix outside the routed experts and see other tokens."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _shares(expert: bool) -> ProcessGroup:
    """The tensor-parallel ranks that share a matrix."""
    if expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()
