"""Run by ranks.py: writes a Hugging Face folder as a checkpoint of Bridge. Arguments: the folder, its place."""

import sys
from pathlib import Path

from workers import leave, load_model, process_group


def main():
    with process_group():
        from nemo_minitron.families import from_hf
        from nemo_minitron.hosts.bridge.load import load_training

        load_training()
        from nemo_minitron.hosts.bridge.students import save_chunks

        folder, place = map(Path, sys.argv[1:])
        save_chunks(load_model(folder), place, from_hf(folder).vocab_size, folder)
    leave()


if __name__ == "__main__":
    main()
