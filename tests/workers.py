"""The frame of every worker of the tests: it sets the backend up and joins the group of all ranks.

def main():
    with process_group():
        run_cases(run_case)
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 120  # a collective that some rank never calls ends after this time


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """One thread a process, and a gloo group of all processes. They leave it together."""
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    yield
    if torch.distributed.is_initialized():  # Lightning ends the group together with a trainer that failed
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def load_model(source: str | Path, plan: Any = None, *, layout: Any = None, **options: Any) -> list[Any]:
    """A folder's filled chunks, or those of a plan's student, built by the host that is installed here."""
    from nemo_minitron.hosts import host_of
    from nemo_minitron.megatron.load import load
    from nemo_minitron.sources.open import open_source

    return load(open_source(source), plan, build=host_of().build, layout=layout, **options)


def run_cases(run_case: Callable[[dict[str, Any], Path, Path], None]) -> None:
    """Calls `run_case(case, folder, out)` for every case; an error says in which case it happened.

    A worker's arguments are a folder, a JSON list of cases and an output folder.
    """
    folder, cases, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    for case in cases:
        try:
            run_case(case, folder, out)
        except Exception as error:
            error.add_note(f"in the case {case['name']}")
            raise


def leave() -> NoReturn:
    """Ends a worker that has trained. Lightning's and NeMo's own exits would wait for process groups that are gone, and
    the helper that saves checkpoints would hold this process's output open."""
    for helper in multiprocessing.active_children():
        helper.kill()
    sys.stdout.flush()
    os._exit(0)


def mask_some():
    """Masks the first tokens of the samples, at most all but one, so that data-parallel ranks have unequal numbers of
    tokens that count."""
    import torch

    from nemo_minitron.megatron.dataset import PackedDataset

    whole = PackedDataset.__getitem__

    def masked(self, index):
        item = whole(self, index)
        length = len(item["loss_mask"])
        start = [0, length - 1, length // 2, 3][(index or 0) % 4]
        return item | {"loss_mask": item["loss_mask"] * (torch.arange(length) >= start)}

    PackedDataset.__getitem__ = masked
