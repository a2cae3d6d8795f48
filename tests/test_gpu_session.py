"""benchmarks/gpu_session.py: parts in processes under limits, a file that grows, and a second call that goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_session

    return gpu_session


def part(driver, name, code, limit=20):
    return driver.Part(name, ("-m", "timeit", "-n", "1", "-r", "1", code), limit)


def test_each_part_ends_alone_and_a_second_call_runs_what_is_not_done(driver, tmp_path):
    out, count = tmp_path / "session.json", tmp_path / "count"
    parts = [
        part(driver, "good", f"open({str(count)!r}, 'a').write('x')"),
        part(driver, "bad", "1 / 0"),
        part(driver, "late", "__import__('time').sleep(60)", limit=2),
        part(driver, "last", "pass"),
    ]
    for _ in range(2):
        found = driver.session(parts, out, "cpu", True, 60)["parts"]
        assert {name: row["state"] for name, row in found.items()} == {
            "good": "done", "bad": "failed", "late": "timed out", "last": "done",
        }  # fmt: skip
    assert count.read_text() == "x"
    assert "ZeroDivisionError" in found["bad"]["end"]
    assert json.loads(out.read_text())["parts"] == found


def test_no_part_begins_without_time(driver, tmp_path, capsys):
    found = driver.session([part(driver, "one", "pass")], tmp_path / "session.json", "cpu", True, driver.LEAST - 1)
    assert found["parts"] == {}
    assert "one: left for the next call" in capsys.readouterr().out


def test_the_parts_that_need_a_gpu_are_left_out_on_a_cpu():
    command = [sys.executable, str(BENCHMARKS / "gpu_session.py"), "--list"]
    for words, shown in (([], True), (["--device", "cpu", "--quick"], False)):
        done = subprocess.run(command + words, capture_output=True, text=True, check=True)
        assert ("kernels" in done.stdout) == shown
        assert "gpu_job.py --precision bf16" in done.stdout


@pytest.mark.slow
@pytest.mark.nemo
def test_a_job_is_killed_and_resumed_on_a_cpu(tmp_path):
    out = tmp_path / "job.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_job.py"), "--device", "cpu", "--quick", "--precision", "fp32"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["found"]
    assert found["largest difference after a kill and a resume"] == 0
    assert found["read without Transformer Engine, bit by bit"] is True
    assert 0 < found["killed at step"] < found["steps"]
