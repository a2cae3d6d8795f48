"""benchmarks/gpu_session.py: parts in processes under limits, a file that grows, and a second call that goes on."""

import json
import subprocess
import sys
from pathlib import Path

import forked
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


def test_no_part_begins_without_time(driver, tmp_path):
    found = driver.session([part(driver, "one", "pass")], tmp_path / "session.json", "cpu", True, driver.LEAST - 1)
    assert found["parts"]["one"]["state"] == "not run"
    assert "the next call runs it" in found["parts"]["one"]["why"]


def test_a_call_that_is_killed_has_told_of_all_parts(driver, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        driver.session([part(driver, n, "pass") for n in "ab"], tmp_path / "session.json", "cpu", True, 60)
    rows = json.loads((tmp_path / "session.json").read_text())["parts"]
    assert {name: row["state"] for name, row in rows.items()} == {"a": "cut off", "b": "not run"}


def test_half_of_a_limit_must_be_left():
    code = "import gpu_session as s; print(*(part.least(quick) for part in s.PARTS[:1] for quick in (False, True)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.stdout == "120.0 20\n", done.stderr


def test_what_was_not_tried_comes_before_what_failed(driver):
    parts = [part(driver, name, "pass") for name in ("failed", "done", "killed", "new")]
    rows = {"failed": {"state": "failed"}, "done": {"state": "done"}, "killed": {"state": "cut off"}}
    assert [part.name for part in driver.in_order(parts, rows)] == ["new", "failed", "killed"]


def test_the_file_says_what_did_not_run_and_why(driver, tmp_path):
    parts = [driver.Part("tests", ("-m", "this"), 9, anywhere=False), driver.Part("large", ("gpu.py", "Llama-8B"), 9)]
    found = driver.session(parts, tmp_path / "session.json", "cpu", True, 60)
    assert found["parts"]["tests"] == {"state": "not run", "why": "it needs a GPU"}
    assert found["parts"]["large"] == {"state": "not run", "why": "its shape is no pico size"}
    assert "teacher ahead on a second stream" in found["not measured"]
    with pytest.raises(SystemExit, match="another device or size"):
        driver.session(parts, tmp_path / "session.json", "cpu", False, 60)


def test_the_summary_is_for_a_person(driver):
    found = {"steps": 24, "bit by bit": True, "bytes held": 2_500_000_000, "stages": {"plan": 0.25}}
    rows = {
        "job": {"state": "done", "seconds": 61.2, "found": found, "end": "noise"},
        "suite": {"state": "failed", "seconds": 9.0, "end": "E  assert\n1 failed, 10 passed in 8.1s\n"},
        "late": {"state": "timed out", "seconds": 90.0, "end": "the last line"},
        "kernels": {"state": "not run", "why": "it needs a GPU"},
    }
    result = {"date": "2026-01-02", "machine": {"device": "H200"}, "not measured": {"stream": "absent"}, "parts": rows}
    lines = driver.summary(result)
    assert lines[0] == "1 of 4 parts done on H200, 2026-01-02"
    table = [line.split() for line in lines[1:6]]
    assert table[0] == ["job", "done", "61", "s"]
    assert table[1] == ["suite", "failed", "9", "s", "1", "failed,", "10", "passed", "in", "8.1s"]
    assert table[3] == ["kernels", "not", "run", "it", "needs", "a", "GPU"]
    assert "  steps 24; bit by bit yes; bytes held 2.50 GB" in lines
    assert "  stages: plan 0.25" in lines
    assert "  the last line" in lines


def test_the_parts_are_listed():
    command = [sys.executable, str(BENCHMARKS / "gpu_session.py"), "--list"]
    for words, shown in (([], True), (["--quick"], False)):
        done = subprocess.run(command + words, capture_output=True, text=True, check=True)
        assert ("step: pico" in done.stdout) != shown
        assert "gpu_job.py --precision bf16" in done.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.nemo
def test_a_job_is_killed_and_resumed_on_a_cpu(tmp_path):
    out = tmp_path / "job.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_job.py"), "--device", "cpu", "--quick", "--precision", "fp32"]
    done = forked.run([*command, "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["found"]
    assert found["largest difference after a kill and a resume"] == 0
    assert found["read without Transformer Engine, bit by bit"] is True
    assert 0 < found["killed after step"] < found["steps"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.nemo
def test_a_folder_becomes_a_student_on_a_cpu(tmp_path):
    out = tmp_path / "cut.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_cut.py"), "--device", "cpu", "--quick", "--out", str(out)]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["found"]
    assert all(found[name]["bytes resident"] > 1e7 for name in ("dry run", "estimate", "plan", "prune"))
    ratios = {name: value for name, value in found["measured over the dry run"].items() if "disk" in name}
    assert [round(value, 2) for value in ratios.values()] == [1.0, 1.0]
