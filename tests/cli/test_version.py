"""`minitron --version`."""

from importlib import metadata

from typer.testing import CliRunner

from nemo_minitron.cli import app


def test_the_version_is_that_of_the_package():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"minitron {metadata.version('nemo_minitron')}\n")
