"""Run by ranks.py, once for each world size: caches, in one process, and trainings that learn from them.

Arguments: folder with models and a corpus, JSON list of cases, output folder, JSON of {cache: its settings}, rows of a
cache. Each case leaves what `minitron distill` leaves of a training.
"""

import json
import sys
from pathlib import Path

from workers import leave, mask_some, process_group, run_cases


def worker_of_the_host():
    """The module that runs and forgets a training, of the host that is installed here."""
    from nemo_minitron.hosts import host_of

    name = host_of().name
    sys.path.insert(0, str(Path(__file__).parent / name))
    if name == "bridge":
        import bridge_worker

        return bridge_worker
    import distill_worker

    distill_worker.start_each_time()
    return distill_worker


def make_caches(folder, caches, samples, forget):
    """Does what `minitron cache-logits` does, but in this process."""
    from nemo_minitron.artifacts.cache_settings import CacheSettings
    from nemo_minitron.commands import cache as command
    from nemo_minitron.hosts import host_of
    from nemo_minitron.megatron import cache as stage
    from nemo_minitron.settings.layout import Layout

    command.launch = lambda order, *_: stage.cache_logits(order, host_of())
    for name, settings in caches.items():
        teacher = str(folder / settings.pop("teacher", "teacher"))
        command.run_cache(
            teacher, str(folder / "corpus"), folder / name, CacheSettings(**settings), Layout(),
            samples=samples, rows_per_shard=3,
        )  # fmt: skip
        forget()


def main():
    with process_group():
        import torch

        worker = worker_of_the_host()
        if torch.distributed.get_world_size() == 1:
            make_caches(Path(sys.argv[1]), json.loads(sys.argv[4]), int(sys.argv[5]), worker.forget)
        mask_some()
        run_cases(worker.run_case)
    leave()


if __name__ == "__main__":
    main()
