"""What every worker of the tests does around its work: it sets the backend up and joins the group of all ranks.

def main():
    with process_group():
        run_cases(run_case)
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 120  # a collective that some rank never calls ends after this time


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """One thread a process, and a gloo group of all of them. All of them leave it together."""
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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
