"""Run by ranks.py: the rotate stage in one layout. Argument: the file of its order."""

import sys

from workers import process_group


def main():
    with process_group():
        from nemo_minitron.hosts import host_of
        from nemo_minitron.megatron.rotate import rotate
        from nemo_minitron.settings.orders import read_order

        rotate(read_order("rotate", sys.argv[1]), host_of())


if __name__ == "__main__":
    main()
