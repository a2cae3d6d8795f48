"""Runs a live model from any of its layers. The hidden state in front of each layer is kept, so what comes before a
dropped block is never run again.

With n layers the complete model costs n layer forwards, and the model without layers i..j costs n - 1 - j more. All
single layers together cost (n + 1) n / 2, and one output head each. It cannot be less, because a dropped block changes
the input of all later layers.

Shapes (docs/shapes.md): S positions of the sequence (S/cp, and /tp under sequence parallelism), B sequences, H hidden
size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from nemo_minitron.artifacts.blocks import NOTHING, Block
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.importance.depth.rows import Rows

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

See = Callable[[Block, Tensor], None]
PARTS = ("layers", "final_layernorm")  # of Megatron's TransformerBlock. Here the head runs the final norm


class ChunkOfLayers:
    """One model chunk of this rank: some of the kept layers, and the states in front of them of one micro-batch.

    `start`, `end`: positions of its layers among the kept ones. Hidden states are [S, B, H], as Megatron passes them
    between its layers.
    """

    def __init__(self, chunk: MegatronModule, number: int, count: int) -> None:
        self.model, self.decoder = chunk, chunk.decoder
        self.is_first, self.is_last = number == 0, number == count - 1
        offset = get_transformer_layer_offset(chunk.config, getattr(chunk, "vp_stage", None))
        self.numbers = range(offset, offset + len(self.decoder.layers))
        self._original_parts = {name: self.decoder._modules[name] for name in PARTS if name in self.decoder._modules}
        self._input = self.decoder.input_tensor
        self._keywords: dict[str, object] = {}
        self._states: dict[int, Tensor] = {}
        self.keep(range(chunk.config.num_layers))

    def keep(self, layers: Sequence[int]) -> None:
        """From now on only these source layers exist."""
        here = [layer for layer in layers if layer in self.numbers]
        self.start = sum(layer < self.numbers.start for layer in layers)
        self.end = self.start + len(here)
        self._kept = [self._original_parts["layers"][layer - self.numbers.start] for layer in here]

    def forward(self, rows: Rows, hidden: Tensor | None) -> Tensor:
        """The complete pass, layer by layer, which keeps every state. `hidden`: None on the first stage."""
        self.decoder.input_tensor = hidden  # Megatron takes the length of the rotary embedding from it
        prepared = self.model._preprocess(rows.tokens, rows.position_ids, decoder_input=hidden)
        names = ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "sequence_len_offset")
        self._keywords = dict(zip(names, prepared[1:5], strict=True))
        self._states = {self.start: prepared[0]}
        for position in range(self.start, self.end):
            self._states[position + 1] = self._run(self._states[position], position, position + 1)
        return self._states[self.end]

    def drop(self, first: int, after: int, hidden: Tensor | None) -> Tensor:
        """The pass without the positions first..after-1. It starts at `hidden`, or at this chunk's own state."""
        hidden = self._states[first] if hidden is None else hidden
        return self._run(hidden, max(self.start, after), self.end)

    def _run(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """Megatron's own TransformerBlock.forward, with its contexts, over some of the layers."""
        if start >= end:
            return hidden
        part = nn.ModuleList(self._kept[start - self.start : end - self.start])
        self.decoder._modules.update(dict.fromkeys(self._original_parts) | {"layers": part})
        self.decoder.input_tensor = hidden
        try:
            return self.decoder(hidden_states=hidden, attention_mask=None, **self._keywords)
        finally:
            self.decoder._modules.update(self._original_parts)

    def close(self) -> None:
        """Drops the states and leaves the model as it was."""
        self._states.clear()
        self._keywords.clear()
        self.decoder.input_tensor = self._input


class Stages:
    """This rank's chunks of the pipeline. They are in evaluation mode while it is open."""

    def __init__(self, model: MegatronModule) -> None:
        chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
        self._group = parallel_state.get_pipeline_model_parallel_group()
        rank, size = torch.distributed.get_rank(self._group), torch.distributed.get_world_size(self._group)
        count = size * len(chunks)
        self._stages = [ChunkOfLayers(unwrap(chunk), rank + size * i, count) for i, chunk in enumerate(chunks)]
        ranks = torch.distributed.get_process_group_ranks(self._group)
        self._before, self._behind = ranks[rank - 1], ranks[(rank + 1) % size]
        self.config = self._stages[0].model.config
        self.device = next(self._stages[0].model.parameters()).device

    @property
    def head(self) -> MegatronModule | None:
        """The model with the output head. None on other pipeline ranks."""
        return self._stages[-1].model if self._stages[-1].is_last else None

    @contextlib.contextmanager
    def open(self) -> Iterator[Stages]:
        """Evaluation mode without gradients. Afterwards everything is as before, even after an error."""
        modes = [stage.model.training for stage in self._stages]
        try:
            for stage in self._stages:
                stage.model.eval()
            with torch.no_grad():
                yield self
        finally:
            for stage, mode in zip(self._stages, modes, strict=True):
                stage.close()
                stage.model.train(mode)

    def run(self, rows: Rows, blocks: Iterable[Block], see: See, kept: Sequence[int] | None = None) -> None:
        """Runs one micro-batch through the complete model and through the model without each block.

        `see(block, hidden)` is called on the rank of the output head with the hidden state before the final norm, first
        for `NOTHING`, then for each block. `kept`: the source layers that exist (default all). `blocks` are positions
        among them. Collective over the pipeline: every rank gives the same blocks. Every stage takes them in the same
        order and sends the state of a block before it starts the next block. So the sender of a state is never waiting
        itself, and there is no deadlock.
        """
        for stage in self._stages:
            stage.keep(range(self.config.num_layers) if kept is None else kept)
            hidden = None if stage.is_first else self._receive(rows)
            self._pass_on(stage, NOTHING, stage.forward(rows, hidden), see)
        # The last blocks come first: then later stages have work of their own while earlier stages do theirs.
        for block in sorted(blocks, reverse=True):
            first, after = block[0], block[1] + 1
            for stage in self._stages:
                before = first < stage.start
                if before or first < stage.end:
                    hidden = stage.drop(first, after, self._receive(rows) if before else None)
                    self._pass_on(stage, block, hidden, see)

    def _pass_on(self, stage: ChunkOfLayers, block: Block, hidden: Tensor, see: See) -> None:
        if stage.is_last:
            see(block, hidden)
        else:
            torch.distributed.send(hidden.contiguous(), self._behind, group=self._group)

    def _receive(self, rows: Rows) -> Tensor:
        parts = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        shape = (rows.tokens.shape[1] // parts, rows.tokens.shape[0], self.config.hidden_size)
        dtype = self.config.pipeline_dtype or self.config.params_dtype
        hidden = torch.empty(shape, dtype=dtype, device=self.device)
        torch.distributed.recv(hidden, self._before, group=self._group)
        return hidden
