"""DataStep shows NeMo's batches to a collector: for the modules of all virtual stages, for several collectors at once,
and it may be removed in any order."""

import itertools
from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningModule

from nemo_minitron.hosts.nemo.callbacks import DataStep


class Module(LightningModule):
    def data_step(self, iterator):
        return next(iterator)["tokens"]


class Seen:
    """Stands for a Collector."""

    def __init__(self):
        self.batches = []

    def expect(self, batch, first):
        self.batches.append((batch["tokens"], first))


def trainer(*modules):
    wrapped = [SimpleNamespace(module=module) for module in modules]  # as under Megatron's DDP
    return SimpleNamespace(strategy=SimpleNamespace(megatron_parallel=wrapped))


def batches(*numbers):
    return iter([{"tokens": number} for number in numbers])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_each_sees_all_and_they_go_in_any_order(order):
    """If `remove` only called `delattr`, the second call would raise; if it only restored what it had found, it would
    bring back a step that was removed."""
    modules = [Module(), Module()]
    own = modules[1].data_step = lambda iterator: -next(iterator)["tokens"]  # a user's own
    lookers = [Seen(), Seen(), Seen()]
    steps = [DataStep(trainer(*modules), looker) for looker in lookers]
    for step in steps:
        step.begin()
    iterators = [batches(1, 2), batches(1, 2)]
    assert [modules[k].data_step(iterators[k]) for k in (0, 1, 0, 1)] == [1, -1, 2, -2]
    for looker in lookers:
        assert looker.batches == [(1, True), (1, False), (2, True), (2, False)]
    left = set(range(3))
    for k in order:
        steps[k].remove()
        left.discard(k)
        for looker in lookers:
            looker.batches.clear()
        assert modules[0].data_step(batches(3)) == 3
        assert [bool(looker.batches) for looker in lookers] == [k in left for k in range(3)]
    assert "data_step" not in vars(modules[0])
    assert modules[1].data_step is own
