"""Run under torchrun, once for a world size: caches, in one process, and trainings that learn from them.

Arguments: folder with models and a corpus, JSON of {cache: its settings}, JSON list of cases, output folder. Each case
leaves what `minitron distill` leaves of a training.
"""

import json
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

import distill_worker


def make_caches(folder, caches, samples):
    """As `minitron cache-logits` does, but in this process."""
    from nemo_minitron.artifacts.cache_settings import CacheSettings
    from nemo_minitron.commands import cache as command
    from nemo_minitron.hosts import host_of
    from nemo_minitron.megatron import cache as stage
    from nemo_minitron.settings.layout import Layout

    command.launch = lambda order, *_: stage.cache_logits(order, host_of())
    for name, settings in caches.items():
        command.run_cache(
            str(folder / "teacher"), str(folder / "corpus"), folder / name, CacheSettings(**settings), Layout(),
            samples=samples, rows_per_shard=3,
        )  # fmt: skip
        distill_worker.forget()


def main():
    folder, caches, cases, out = Path(sys.argv[1]), *map(json.loads, sys.argv[2:4]), Path(sys.argv[4])
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    if torch.distributed.get_world_size() == 1:
        make_caches(folder, caches, samples=int(sys.argv[5]))
    distill_worker.mask_some()
    distill_worker.start_each_time()
    for case in cases:
        distill_worker.run_case(case, folder, out)
    torch.distributed.barrier()
    for helper in multiprocessing.active_children():  # Megatron's, of saves: it would keep this process's pipes open
        helper.kill()
    sys.stdout.flush()
    os._exit(0)  # Lightning's and NeMo's own exits wait for process groups that are gone


if __name__ == "__main__":
    main()
