"""The stage that writes the teacher in rotated coordinates of its residual stream, before it is scored and cut."""

from __future__ import annotations

from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.commands.rotate import describe
from nemo_minitron.commands.rotate import rotate as rotated
from nemo_minitron.data import Tokens
from nemo_minitron.job.fitted import fitted_calibration
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.teacher import clear_torn, teacher_folder


def rotate(run: Run) -> None:
    """The stage after the data: it leaves the rotated teacher, which later stages score and cut."""
    teacher, tokens = run.open(teacher_folder(run)), Tokens(corpora.prefix(run, "calibration"))
    calibration = fitted_calibration(run.job, teacher.architecture, tokens).settings
    out, sums = run.folder.rotated, run.folder.covariance
    clear_torn(out)
    rotation = rotated(teacher, tokens.prefix, out, sums, calibration, run.job.layout, run.folder.log)
    sums.unlink()
    run.say(f"    {describe(rotation)}")


def _inputs(run: Run) -> object:
    """The rows and the teacher. What else a calibration scores plays no part here."""
    rows = run.job.calibration
    return [rows.samples, rows.sequence_length, rows.seed, rows.precision, run.open(run.job.teacher).identity]


ROTATE = Stage(
    "rotate", rotate, _inputs, ("data",), (f"{RunFolder.rotated}/config.json",), lambda run: (RunFolder.rotated,)
)
