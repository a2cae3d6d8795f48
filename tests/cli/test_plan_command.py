"""`minitron plan`, in this process: the table, the files beside the plan, the refusals."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from pico import SIZES
from spaces import NEMOTRON, PICO, SPACE_8B
from typer.testing import CliRunner

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.cli import app
from nemo_minitron.errors import InputError
from nemo_minitron.search import plan


@pytest.fixture
def scores(tmp_path):
    generator = np.random.default_rng(0)
    made = Scores(PICO, {n: generator.random(s, np.float32) for n, s in expected_shapes(PICO).items()})
    made.depth["loss"] = {(i, i): float(i) for i in range(4)} | {(0, -1): 0.5}
    made.save(tmp_path / "scores.safetensors")
    return made


@pytest.fixture
def run(tmp_path, scores, monkeypatch):
    """The command in a folder that holds the scores; its output."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return invoke


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_budget(run, scores, tmp_path):
    output = run(
        "scores.safetensors", "--params", "1.4K", "--bounds", "ffn=5:20,heads=4:8", "--top", 4, "--tolerance", "5%"
    )
    made, listed = PrunePlan.load(tmp_path / "plan.json"), rows(tmp_path / "plan.candidates.csv")
    best = {name: int(listed[0][name]) for name in ("layers", "hidden", "ffn", "heads")}
    assert made.keep == plan(scores, best).keep
    assert int(listed[0]["parameters"]) == made.target.parameters()
    assert 1330 <= made.target.parameters() <= 1470
    assert int(listed[0]["bytes"]) == made.target.memory(batch=1, context=4096)
    assert made.notes["budget"] == ["1,330 to 1,470 parameters"]
    assert [row["rank"] for row in listed[:5]] == ["1", "2", "3", "4", ""]  # behind the top what else is on the front
    kept = [float(row["kept"]) for row in listed[:4]]
    assert kept == sorted(kept, reverse=True)
    figure = rows(tmp_path / "plan.pareto.csv")
    assert {row["name"] for row in figure} == {row["name"] for row in listed}
    assert {row["name"] for row in figure if row["front"] == "1"} == {r["name"] for r in listed if r["front"] == "1"}
    assert (tmp_path / "plan.pareto.svg").read_text().startswith("<?xml")
    table = [line.split() for line in output.splitlines() if line.strip()[:1] in ("1", "4", "u")]
    assert [line[0] for line in table] == ["1", "4", "uncut"]
    assert table[0][1:5] == [str(size) for size in best.values()]
    close = [row["rank"] for row in listed[1:4] if math.log(kept[0] / float(row["kept"])) <= -0.15 * math.log(kept[0])]
    assert [row["rank"] for row in listed[1:4] if row["near_first"] == "1"] == close != []
    assert [line.split()[0] for line in output.splitlines() if line.split()[1:2] == ["~"]] == close
    assert f"~: {len(close)} other shape" in output


def test_a_budget_is_the_most(run, tmp_path):
    """Also as a share of the model; without a tolerance no shape is above it."""
    wanted = PICO.parameters() * 7 // 10
    run("scores.safetensors", "--params", wanted, "--bounds", "ffn=5:20,heads=4:8")
    made, listed = PrunePlan.load(tmp_path / "plan.json"), rows(tmp_path / "plan.candidates.csv")
    assert 0.6 * PICO.parameters() < made.target.parameters() <= wanted
    assert all(int(row["parameters"]) <= wanted for row in listed)
    run("scores.safetensors", "--params", "0.7x", "--bounds", "ffn=5:20,heads=4:8", "--out", "share.json")
    assert PrunePlan.load(tmp_path / "share.json").keep == made.keep


def test_two_plans_share_no_file(run, tmp_path):
    run("scores.safetensors", "--params", "0.8x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run("scores.safetensors", "--params", "0.6x", "--out", "small.json")
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.items() >= before.items()
    assert {f"small.{end}" for end in ("json", "candidates.csv", "pareto.svg", "pareto.csv")} == set(after) - set(
        before
    )


def test_a_budget_above_the_model_says_so(run):
    output = run("scores.safetensors", "--params", 10 * PICO.parameters())
    assert f"remark: nothing has to be cut: the model, with {PICO.parameters():,} parameters, is within" in output
    assert "remark" not in run("scores.safetensors", "--params", "0.7x", "--overwrite")


def test_sizes_as_before(run, scores, tmp_path):
    output = run("scores.safetensors", "--keep", "ffn=9,layers=3", "--out", "mine.json")
    assert PrunePlan.load(tmp_path / "mine.json").keep == plan(scores, {"ffn": 9, "layers": 3}).keep
    assert f"{PICO.parameters():,} -> " in output
    run("scores.safetensors", "--keep", "layers=3", "--depth", "loss")
    assert PrunePlan.load(tmp_path / "plan.json").keep == {"layers": [1, 2, 3]}
    assert not (tmp_path / "plan.candidates.csv").exists()


def test_a_fixed_axis_and_another_criterion_of_depth(run, tmp_path):
    """Blocks of one layer were scanned: three layers, or four, can be planned."""
    run("scores.safetensors", "--flops", "20K", "--context", 64, "--keep", "hidden=12", "--depth", "loss")
    made = PrunePlan.load(tmp_path / "plan.json")
    assert made.target.hidden_size == 12
    assert made.target.num_layers == 3
    assert made.keep["layers"] == [1, 2, 3]
    assert made.target.flops_per_token(64) <= 20_000
    assert {row["layers"] for row in rows(tmp_path / "plan.candidates.csv")} <= {"3", "4"}


@pytest.mark.parametrize("kind", ["sizes", "folder", "config"])
def test_an_architecture_alone(run, tmp_path, kind):
    """Of a JSON of sizes, a model's folder and its config; nothing is written."""
    source = tmp_path / "source.json"
    config = {"architectures": ["LlamaForCausalLM"], **SIZES}
    if kind == "folder":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        source = tmp_path / "model"
    else:
        source.write_text(json.dumps(config if kind == "config" else NEMOTRON.as_dict()))
    before = sorted(tmp_path.rglob("*"))
    if kind == "sizes":
        options = ["--tolerance", "5%", "--space", SPACE_8B, "--no-maximal", "--top", 20, "--dry-run"]
        output = run("--architecture", source, "--params", "8.27B", *options)
        assert "160 shapes, 20 within the budget, 20 shown" in output
    else:
        output = run("--architecture", source, "--params", "150K", "--dry-run")
        assert "kept" not in output
    assert "nothing was written" in output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_loads_nothing_heavy(tmp_path):
    (tmp_path / "n.json").write_text(json.dumps(NEMOTRON.as_dict()))
    arguments = ["plan", "--architecture", str(tmp_path / "n.json"), "--params", "8.27B", "--space", SPACE_8B]
    arguments.append("--dry-run")
    script = (
        "import sys\nfrom nemo_minitron.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'nemo', 'megatron', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("scores.safetensors", "there is nothing to plan; give a target, for example --params 84M"),
        ("--params 1K", "give either scores or --architecture"),
        ("scores.safetensors --params 1", "shapes has at most 1 parameters; the nearest is layers="),
        ("scores.safetensors --params 1.4X", "--params=1.4X is not a size"),
        ("scores.safetensors --params 1.0x", "--params=1.0x is no smaller model"),
        ("scores.safetensors --memory 3KiB --weights int4", "weights 'int4' is unknown"),
        ("scores.safetensors --params 1K --depth los", "did you mean 'loss'"),
        ("scores.safetensors --params 1K --top 0", "candidates is 0; the nearest legal value is 1"),
        ("scores.safetensors --keep ffn=many", "'ffn=many' in --keep is not a size"),
        ("scores.safetensors --keep ffn=3 --baseline best", "baseline 'best' is unknown"),
        ("--architecture nowhere.json --params 1K", "the architecture 'nowhere.json' does not exist"),
    ],
)
def test_refused(run, tmp_path, arguments, words):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:  # `main` prints it and exits with 2
        run(*arguments.split())
    assert words in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
