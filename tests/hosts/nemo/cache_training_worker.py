"""Run by ranks.py, once for each world size: caches, in one process, and trainings that learn from them.

Arguments: folder with models and a corpus, JSON list of cases, output folder, JSON of {cache: its settings}, rows of a
cache. Each case leaves what `minitron distill` leaves of a training.
"""

import json
import sys
from pathlib import Path

import distill_worker
from workers import leave, process_group, run_cases


def make_caches(folder, caches, samples):
    """Does what `minitron cache-logits` does, but in this process."""
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
    with process_group():
        import torch

        if torch.distributed.get_world_size() == 1:
            make_caches(Path(sys.argv[1]), json.loads(sys.argv[4]), samples=int(sys.argv[5]))
        distill_worker.mask_some()
        distill_worker.start_each_time()
        run_cases(distill_worker.run_case)
    leave()


if __name__ == "__main__":
    main()
