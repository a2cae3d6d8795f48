"""Run by ranks.py: the compensate stage in one layout. Argument: the file of its order."""

import sys

from workers import process_group


def main():
    with process_group():
        from nemo_minitron.hosts import host_of
        from nemo_minitron.megatron.compensate import compensate
        from nemo_minitron.settings.orders import read_order

        compensate(read_order("compensate", sys.argv[1]), host_of())


if __name__ == "__main__":
    main()
