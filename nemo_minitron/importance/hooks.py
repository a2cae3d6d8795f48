"""Hooks on a model that are on while a `with` block is open, and that know the micro-batch in hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from nemo_minitron.importance.samples import Samples, samples_of

if TYPE_CHECKING:
    from typing import Self

    from torch.utils.hooks import RemovableHandle


class Hooks(ABC):
    """A subclass yields the handle of each hook that it registers. `run_forward` calls `expect` before a micro-batch.

    No hook is left behind, even after an error.
    """

    _handles: tuple[RemovableHandle, ...] = ()
    _in_hand: Samples | None = None

    @abstractmethod
    def register(self) -> Iterator[RemovableHandle]: ...

    def __enter__(self) -> Self:
        try:
            for handle in self.register():
                self._handles += (handle,)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def expect(self, batch: Mapping[str, Tensor], first: bool = True) -> None:
        """Takes the next micro-batch. `first` is False when a later virtual stage of this rank gets it again."""
        self._in_hand = samples_of(batch)

    @property
    def in_hand(self) -> Samples:
        """The samples of the micro-batch in hand."""
        assert self._in_hand is not None, "expect was not called before the forward pass"
        return self._in_hand
