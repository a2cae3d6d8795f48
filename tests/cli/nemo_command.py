"""Run by test_nemo_command.py in a folder with `recipe.py` and a run that lacks its distilled student: `nemo minitron`
as its users type it, several times in one process, since NeMo-Run imports all of NeMo for it. Prints JSON."""

import importlib
import json
import os
import sys
from pathlib import Path

WORKSPACE = """
from nemo_minitron.cli.find import find
from nemo_minitron.cli import nemo_run as plugin
def pico():
    return find("recipe.py")
plugin.add_recipe("pico", pico)
"""
SETTINGS = ["distillation.tokens=2000", "keep.ffn=1280", "layout.sp=true", "evaluation.prompts=['a b','c']"]


def main() -> None:
    Path("workspace.py").write_text(WORKSPACE)  # where NeMo-Run's users keep factories of their own
    importlib.import_module("nemo_minitron.cli.nemo_run")
    heavy = [name for name in ("nemo", "lightning", "megatron", "transformers") if name in sys.modules]
    sys.argv = ["nemo", "minitron"]  # it adds a namespace's commands if it is asked for one
    from nemo_run.__main__ import app
    from typer.testing import CliRunner

    def nemo(*arguments: str) -> list:
        sys.argv = ["nemo", "minitron", *arguments]
        done = CliRunner().invoke(app, sys.argv[1:])
        return [done.exit_code, done.output]

    shipped = ("--factory", "smollm2_135m_to_108m_width")
    found = {
        "heavy": heavy,
        "commands": nemo("--help"),
        "factories": nemo("compress", "--help"),
        "dryrun": nemo("estimate", *shipped, *SETTINGS, "--dryrun"),
        "yaml": nemo("compress", *shipped, *SETTINGS, "--to-yaml", "job.yaml"),
        "unknown": nemo("compress", *shipped, "distillation.tokns=2000", "--dryrun"),
        "run": nemo("distill", "--factory", "pico", "out=by-nemo", "run.executor=local", "--yes"),
    }
    job = Path("job.yaml")
    job.write_text(job.read_text().replace("_partial_: true\n", ""))  # which NeMo-Run writes and cannot read
    found["again"] = nemo("compress", "--yaml", "job.yaml", "seed=3", "--to-yaml", "again.yaml")
    os.environ |= {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "3", "GROUP_WORLD_SIZE": "1", "RANK": "1"}
    found["three for one"] = nemo("plan", "--factory", "pico", "out=none", "--yes")
    found["not the first"] = nemo("plan", "--factory", "pico", "layout.tp=3", "out=none", "--yes")
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    main()
