"""A stage's output is read to its end even if the log and the screen fail; it says what ended the stage."""

import errno
import io
import os
import sys

import pytest
from pico_order import pico_order

from nemo_minitron.errors import InputError
from nemo_minitron.launch import torchrun as launching
from nemo_minitron.launch.output import MARK, Output
from nemo_minitron.launch.torchrun import launch

TALKER = """
import sys
for number in range(20_000):
    print("a line that fills the pipe", number, flush=True)
if sys.argv[1] == "fail":
    raise ValueError("broken")
"""


def read(*lines):
    output = Output(None)
    output.read(lines)
    return output


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["/x/y.py:3: FutureWarning: old\n", "  warnings.warn(\n", "it says so\n"], "it says so"),
        (
            ["FutureWarning: old\n", "OSError: [Errno 28] No space\n", "RuntimeError: later\n"],
            "OSError: [Errno 28] No space",
        ),
        (["Traceback\n", "[rank1]: ValueError: first\n", "KeyError: 'later'\n"], "[rank1]: ValueError: first"),
        ([f'{MARK}{{"rank": 3, "error": "it is full"}}\n', "ValueError: else\n"], "rank 3: it is full"),
        (["/x/y.py:3: FutureWarning: old\n"], "it printed nothing"),
        ([], "it printed nothing"),
    ],
)
def test_the_cause_is_the_first_error_and_no_warning(lines, cause):
    assert read(*lines).cause() == cause


def test_a_workers_own_line_is_found_behind_anothers_half_line():
    output = read(f'half a line of rank 0{MARK}{{"rank": 1, "pid": 7, "layers": 2, "mark": [1]}}\n', f"{MARK}no json\n")
    assert (output.ranks[1].pid, output.ranks[1].layers) == (7, 2)
    assert list(output.tail) == ["half a line of rank 0", f"{MARK}no json\n"]


def test_a_log_on_a_full_disk_is_told_of_and_everything_is_read(capsys):
    output = Output("/dev/full")
    output.read(["one\n", "  > step 1\n", "ValueError: last\n"])
    assert output.lost == "its log '/dev/full' could not be written: No space left on device"
    assert output.cause() == "ValueError: last"
    assert capsys.readouterr().out == "> step 1\n"


def test_a_screen_that_is_gone_stops_nothing(monkeypatch):
    class ConnectionLost(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(sys, "stdout", ConnectionLost())
    assert read("  > step 1\n", "last\n").cause() == "last"


@pytest.fixture
def talker(tmp_path, monkeypatch):
    (tmp_path / "pico_talker.py").write_text(TALKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_workers_do_not_hang_where_the_log_cannot_be_written(talker, capfd):
    """Half a megabyte of output, a pipe holds 64 kB. Mutation: a reader that ends with the first failed write leaves
    the worker in its pipe for ever."""
    launch(pico_order("work", 1), "pico_talker", "/dev/full")
    assert capfd.readouterr().err == "its log '/dev/full' could not be written: No space left on device\n"
    with pytest.raises(RuntimeError, match="exit code 1: ValueError: broken; its log '/dev/full' could not be written"):
        launch(pico_order("fail", 1), "pico_talker", "/dev/full")


def test_an_order_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    """The folder of temporary files lies on a full disk."""

    def full(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(launching.Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*order.json'"):
        launch(pico_order("work", 1), "pico_talker")


def test_a_timeout_that_is_no_number_is_refused(monkeypatch):
    from nemo_minitron.launch.stall import stall_timeout

    monkeypatch.setenv("MINITRON_STALL_TIMEOUT", "soon")
    with pytest.raises(InputError, match="'soon'; it must be a whole number of seconds"):
        stall_timeout()
