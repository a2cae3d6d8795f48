"""`minitron --version`, and what a shell completes."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
from typer.testing import CliRunner

from nemo_minitron.cli import COMPLETING, app

MINITRON = "import sys; sys.argv = ['minitron']; from nemo_minitron.cli import main; main()"


def test_the_version_is_that_of_the_package():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"minitron {metadata.version('nemo_minitron')}\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("minitron eva", ["evaluate"]),
        ("minitron evaluate --draft", ["--draft-of", "--draft-out"]),
        ("minitron compress --par", ["--params"]),
    ],
)
def test_a_shell_completes_commands_and_their_options(line, words):
    asked = {COMPLETING: "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", MINITRON], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == words, done.stderr
