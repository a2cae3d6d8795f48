"""Hooks around the schedule of micro-batches of each training step. Bridge's callbacks do not see the micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from nemo_minitron.hosts.bridge.load import load_training


@dataclasses.dataclass
class Step:
    """The micro-batches of a step. `options`: the arguments of Megatron's schedule."""

    options: dict[str, Any]

    @property
    def count(self) -> int:
        return self.options["num_microbatches"]

    @property
    def micro_batch_size(self) -> int:
        return self.options["micro_batch_size"]

    def replay(self) -> tuple[Any, int]:
        """A second copy of the micro-batches, one iterator or one for each virtual stage, and their sequence length.

        The step has not read its micro-batches yet. They are read here, and the step then gets the same ones.
        """
        source = self.options["data_iterator"]
        stages = len(source) if isinstance(source, list) else 0
        first = source[0] if stages else source
        items = [next(first) for _ in range(self.count)]

        def copy() -> Iterator[Any] | list[Iterator[Any]]:
            return [iter(items) for _ in range(stages)] if stages else iter(items)

        self.options["data_iterator"] = copy()
        return copy(), self.options["seq_length"]


Before = Callable[[Step], None]
After = Callable[[Step, list[Any]], None]
_hooks: list[tuple[Before, After]] = []  # of the training that runs


def around_steps(before: Before, after: After) -> Callable[[], None]:
    """Calls `before` and `after` around the schedule of every training step, until the function that it returns is
    called.

    `after` also gets what the schedule returns: on the last pipeline stage a dict of losses for each micro-batch. Call
    it before a training begins: Bridge's loop then asks for its schedule, by one name, which is replaced here. A
    validation asks elsewhere.
    """
    _install()
    hooks = before, after
    _hooks.append(hooks)

    def remove() -> None:
        if hooks in _hooks:
            _hooks.remove(hooks)

    return remove


@functools.cache
def _install() -> None:
    """Replaces the name. Without hooks the loop's schedule is Megatron's."""
    train: Any = load_training()
    original = train.get_forward_backward_func

    @functools.wraps(original)
    def get_forward_backward_func(*arguments: Any, **options: Any) -> Callable[..., Any]:
        schedule = original(*arguments, **options)

        def around(**options: Any) -> Any:
            step = Step(options)
            for before, _ in _hooks:
                before(step)
            losses = schedule(**step.options)
            for _, after in _hooks:
                after(step, losses)
            return losses

        return around

    train.get_forward_backward_func = get_forward_backward_func
