"""Runs the same commands on NeMo 2 and on Megatron-Bridge, and tells which files have the same bytes.

The model is a pico Qwen3-MoE with a dense layer among its mixtures.

    .venv/bin/python benchmarks/two_hosts.py --bridge .venv-bridge/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from nemo_minitron.artifacts.files import file_digest  # noqa: E402

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, "mlp_only_layers": [1]}
SIZES |= {"intermediate_size": 96, "moe_intermediate_size": 48}
ROWS = "--data text.jsonl --samples 8 --sequence-length 32 --batch-size 2"
CACHE = "cache-logits teacher --data text.jsonl --sequence-length 32"
COMMANDS = {  # the file or folder that a command leaves -> the command
    "scores": f"estimate teacher {ROWS} --depth loss",
    "reap": f"estimate teacher {ROWS} --experts reap",
    "sharded": f"estimate teacher {ROWS} --experts reap --tp 2 --ep 2 --etp 1 --sp",
    "stages": f"estimate teacher {ROWS} --pp 2",
    "bf16": f"estimate teacher {ROWS} --precision bf16",
    "fp8": f"estimate teacher {ROWS} --precision fp8-current",
    "plan": "plan reap --keep experts=2,expert_ffn=32,hidden=32,ffn=64",
    "compensation": f"compensate teacher plan {ROWS}",
    "student": "prune teacher plan student",
    "cache": CACHE,
    "cache-bf16": f"{CACHE} --ep 2 --dp 2 --precision bf16",
    "cache-fp8": f"{CACHE} --precision fp8-current",
}


def make(folder: Path) -> None:
    """The teacher and its text."""
    from command_line import TEXTS
    from pico import pico_qwen3_moe
    from words import save_tokenizer

    save_tokenizer(pico_qwen3_moe(folder / "teacher", **SIZES), TEXTS, 509)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))


def run(folder: Path, python: str, host: str) -> dict[str, dict[str, str]]:
    """Output -> its files -> their digests, of all commands on a host. The last command's outputs stay in `folder`."""
    found = {}
    for name, command in COMMANDS.items():
        out = [] if command.startswith("prune") else ["--out", name]
        words = [python, "-m", "nemo_minitron", *command.split(), *out, "--host", host]
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        files = [file for file in (folder / name).rglob("*") if file.is_file()] or [folder / name]
        found[name] = {str(file.relative_to(folder)): file_digest(file) for file in sorted(files)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nemo", default=sys.executable, help="The Python of NeMo's environment. Default: this one.")
    parser.add_argument("--bridge", required=True, help="The Python of Megatron-Bridge's environment.")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = []
    with tempfile.TemporaryDirectory() as place:
        made = Path(place, "made")
        made.mkdir()
        make(made)
        for host, python in (("nemo", options.nemo), ("bridge", options.bridge)):
            folder = Path(place, host)
            subprocess.run(["cp", "-r", made, folder], check=True)
            found.append(run(folder, str(Path(python).absolute()), host))
    for name in COMMANDS:
        print(f"{name:14}{'the same bytes' if found[0][name] == found[1][name] else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
