"""Progress: a bar on a terminal; in a log a line with a rate and the time left, and how often."""

import os
import pty
import re
import subprocess
import sys

import pytest

from nemo_minitron import progress
from nemo_minitron.launch.output import Output
from nemo_minitron.megatron import progress as workers
from nemo_minitron.progress import SECONDS, Meter, Progress
from nemo_minitron.settings.progress import LIFELINE, MARK

HERE = """
import sys, time
from nemo_minitron.progress import Progress

with Progress("evaluate: window", "tokens", 512) as shown:
    for done in range(4):
        shown(done, 3)
        time.sleep(0.4)
    print("a remark")
    time.sleep(0.4)
print("the end")
"""
WORKER = """
import json, sys, time
from nemo_minitron.launch.output import Output
from nemo_minitron.settings.progress import MARK

output = Output(sys.argv[1])
for done in range(4):
    work = {"what": "calibration: row", "done": done, "total": 3, "rate": 99.0, "unit": "tokens", "left": 5.0}
    output.read([MARK + json.dumps({"rank": 0, "work": work, "line": done == 2}) + "\\n", "  > a remark\\n"])
    time.sleep(0.4)
output.bar.close()
print("the end")
"""


@pytest.fixture
def clock(monkeypatch):
    """The seconds of the clock, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_rate_and_time_left(clock):
    lines = []
    shown = Progress("evaluate: window", "tokens", 512, lines.append)
    clock[0] += SECONDS - 1
    shown(3, 40)  # too early
    clock[0] += 1
    shown(4, 40)
    clock[0] += 1
    shown(5, 40)  # too soon after the last line
    assert lines == ["> evaluate: window 4/40  205 tokens/s  90 s left"]


def test_what_was_done_before_does_not_count(clock):
    lines = []
    shown = Progress("generate: document", say=lines.append)
    shown.begin(30)
    clock[0] += SECONDS
    shown(30, 40)  # nothing yet
    shown(35, 40)
    assert lines == ["> generate: document 35/40  0.5 steps/s  10 s left"]


def test_work_without_a_known_end(clock):
    lines = []
    shown = Progress("tokenise:", "tokens", say=lines.append)
    shown(5)  # too early
    clock[0] += SECONDS
    shown(1_200_000)
    shown(1_300_000)  # too soon after the last line
    assert lines == ["> tokenise: 1,200,000 tokens  120,000 tokens/s"]


@pytest.mark.parametrize(("seconds", "words"), [(119, "119 s"), (600, "10 min"), (86_400, "24.0 h")])
def test_a_long_time_is_told_in_minutes_and_hours(clock, seconds, words):
    meter = Meter("step")
    clock[0] += seconds
    assert meter.at(1, 2, "loss 0.5").line().endswith(f"  {words} left")


def reported(capfd):
    """What a launcher prints of the lines that this process, as a worker, has sent."""
    sent = capfd.readouterr().out.splitlines(keepends=True)
    Output(None).read(sent)
    return len(sent), capfd.readouterr().out.splitlines()


def test_a_worker_tells_its_launcher_twice_a_second_and_a_log_has_a_line_every_ten(clock, capfd, monkeypatch):
    monkeypatch.setenv(LIFELINE, "1")
    report = workers.rows("calibration", 40, 512, 30)
    for _ in range(44):
        clock[0] += 0.25
        report(35, 40)
    sent, lines = reported(capfd)
    assert lines == [
        "> calibration: 30 of 40 rows were done before, goes on from there",
        "> calibration: row 35/40  256 tokens/s  10 s left",
    ]
    assert 20 <= sent <= 26


def test_without_a_launcher_a_worker_prints_lines_alone(clock, capfd):
    report = workers.Report("step", scale=64)
    clock[0] += 2
    report(1, 4, "loss 0.5000", line=True)
    report(2, 4, "loss 0.4000", line=False)
    assert capfd.readouterr().out == "  > step 1/4  loss 0.5000  32 tokens/s  6 s left\n"


@pytest.mark.parametrize(
    "wrong", ["3", '{"what": "x"}', '{"what": 1, "done": "2", "total": [], "rate": 1, "unit": "", "left": 0}']
)
def test_a_worker_that_tells_nonsense_is_not_believed(wrong, capsys):
    output = Output(None)
    output.read([f'{MARK}{{"rank": 0, "work": {wrong}, "line": true}}\n'])
    assert len(output.tail) == 1
    assert capsys.readouterr().out == ""


def on_a_terminal(script, *arguments, columns=80):
    """(what a terminal gets of a script's two streams, without colours; the columns it has)."""
    ours, theirs = pty.openpty()
    plain = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"}
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=theirs, stderr=theirs, env=plain)
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # Linux says so that the other end is closed
            break
        if not more:
            break
        shown += more
    os.close(ours)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[\d;]*m", "", shown.decode())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(("script", "what"), [(HERE, "evaluate: window"), (WORKER, "calibration: row")])
def test_a_terminal_has_a_bar_that_moves_and_is_taken_away(tmp_path, script, what, columns):
    """A remark that is printed meanwhile stands above it. The log has the line that the terminal has no need of."""
    shown = on_a_terminal(script, str(tmp_path / "log.txt"), columns=columns)
    bars = [bar for bar in re.split(r"[\r\n]+", shown) if f"> {what}" in bar]
    assert all(f"{done}/3" in "".join(bars) for done in range(4))
    assert all("━" in bar for bar in bars)
    assert all(len(re.sub(r"\x1b\[\S*?[A-Za-z]", "", bar)) <= columns for bar in bars)
    assert "tokens/s" in bars[-1]
    assert "s left" in bars[-1]
    assert "a remark" in shown
    *_, last = shown.rstrip().splitlines()
    assert last.endswith("the end")
    assert "\x1b[2K" in shown[shown.rindex("━") :]  # the line of the bar is erased
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is shown again
    if script == WORKER:
        assert "calibration: row 2/3  99 tokens/s  5 s left" in (tmp_path / "log.txt").read_text()
