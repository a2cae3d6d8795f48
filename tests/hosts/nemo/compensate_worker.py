"""Run under torchrun: the compensate stage in one layout. Argument: the file of its order."""

import sys
from datetime import timedelta


def main():
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    from nemo_minitron.hosts import host_of
    from nemo_minitron.megatron.compensate import compensate
    from nemo_minitron.settings.orders import read_order

    compensate(read_order("compensate", sys.argv[1]), host_of())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
