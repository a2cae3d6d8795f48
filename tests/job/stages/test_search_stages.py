"""The stages of a search in this process, with evaluation and training put in by the test: what is done and not done
again, which files stay. The real ones: tests/cli/test_search_job.py."""

import json

import numpy as np
import pytest
from pico import pico_llama

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.errors import DivergedError
from nemo_minitron.families import from_hf
from nemo_minitron.job import Data, Distillation, Job, Search
from nemo_minitron.job.run import Stage, execute, open_run
from nemo_minitron.job.stages import candidate, marginals
from nemo_minitron.job.stages import search as search_stages
from nemo_minitron.job.stages.search import winner
from nemo_minitron.pruning import HFSource

LOSS = {5: 1.0, 6: 2.0, 4: 3.0, 3: 4.0}  # of the cut model, by its layers


class Text(str):
    """The prefix of a text, which is long enough for every row."""

    tokens = 1 << 20

    def samples(self, length):
        return self.tokens // length


class World:
    """A run folder with scores; `done` lists what was measured and trained, in order."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.done, self.fail, self.diverges = folder, [], None, None
        pico_llama(folder / "teacher")
        self.source = from_hf(folder / "teacher")
        generator = np.random.default_rng(0)
        tensors = {n: generator.random(s, np.float32) for n, s in expected_shapes(self.source).items()}
        self.job = Job(
            "pico", str(folder / "teacher"), Data("a", "b"), keep={"hidden": 48},
            search=Search(
                params="130K", tolerance="50%", space="layers=3,4,5,6", maximal=False, candidates=4, distil=3, steps=6
            ),
            distillation=Distillation(
                sequence_length=8, global_batch_size=2, correction_tokens=100, validate_every=2, patience=1
            ),
        )  # fmt: skip
        self.run = open_run(self.job, folder / "run")
        Scores(self.source, tensors).save(folder / "run" / "scores.safetensors")
        for room in (candidate, marginals):
            monkeypatch.setattr(room, "measure", self.measure)
        for room in (candidate, search_stages):
            monkeypatch.setattr(room, "corpus_identity", lambda prefix: "text")
        monkeypatch.setattr(search_stages, "run_training", self.train)
        monkeypatch.setattr("nemo_minitron.job.stages.corpora.prefix", lambda run, split: split)
        monkeypatch.setattr("nemo_minitron.data.Tokens", Text)

    def measure(self, folder, tokens, settings):
        layers = from_hf(folder).num_layers
        self.done.append(("measured", layers))
        return {"loss": LOSS[layers]}

    def train(self, student, teacher, prefixes, out, recipe, layout, log, stop, plan):
        """Losses fall with layers: what was worst before training is best after it."""
        layers = student.architecture.num_layers
        if self.fail == (layers, stop):
            raise RuntimeError("killed")
        self.done.append(("trained", layers, stop))
        assert recipe.save_every == recipe.steps // 3  # where a round ends
        assert (recipe.correction_tokens, recipe.patience) == (0, 0)  # else each would train a teacher of its own
        assert PrunePlan.load(plan).target == student.architecture
        out.mkdir(exist_ok=True)
        last = 1 if self.diverges == layers else stop
        rows = [f"{step},0,{layers / step},0" for step in range(1, last + 1)]
        (out / "loss.csv").write_text("step,tokens,loss,seconds\n" + "\n".join(rows) + "\n")
        if last < stop:
            raise DivergedError("training stopped at step 2: the loss is NaN")

    def search(self, *settings):
        self.done.clear()
        run = open_run(self.job.override(settings), self.folder / "run")
        before = [Stage(name, lambda run: None, lambda run: None) for name in ("data", "estimate")]
        choosing, trying = search_stages.search_stages(run.job)
        execute(run, [*before, *choosing, *trying])
        return run


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


TRAINED = [(layers, 2) for layers in (5, 6, 4)] + [(4, 4), (5, 4), (4, 6), (5, 6)]


def test_the_teacher_is_opened_once(world, monkeypatch):
    """Four candidates are cut from it and three of them learn from it. Mutation: `Run.open` without its memory."""
    opened, begin = [], HFSource.__init__

    def noted(self, folder):
        opened.append(folder)
        begin(self, folder)

    monkeypatch.setattr(HFSource, "__init__", noted)
    world.search()
    assert opened.count(world.folder / "teacher") == 1


def test_a_search(world):
    run = world.search()
    measured = json.loads((run.path("search", "measured.json")).read_text())
    assert sorted(done[1] for done in world.done if done[0] == "measured") == [3, 4, 5, 6]
    assert [row["layers"] for row in measured] == [5, 6, 4, 3]
    assert [done[1:] for done in world.done if done[0] == "trained"] == TRAINED
    made = PrunePlan.load(winner(run).plan)
    assert made.target.num_layers == 4
    assert made == PrunePlan.load(run.path("search", measured[2]["name"], "plan.json"))
    assert not list(run.folder.path.glob("search/*/distilled"))
    assert not list(run.folder.path.glob("search/*/student"))
    assert len(list(run.folder.path.glob("search/*/curve.json"))) == 3


def test_losses_of_single_axes_rank_the_shapes(world, monkeypatch):
    """`hidden` is the same in all shapes, so it is not cut alone."""
    given = ("search.proxy=losses", "search.marginals=2", "search.candidates=3")
    monkeypatch.setattr(marginals, "solve_cuts", lambda run, cuts: solved.extend(cut.path.name for cut in cuts))
    solved = []
    run = world.search(*given)
    assert solved == ["layers3", "layers5"]
    found = json.loads(run.folder.marginals.read_text())
    assert found == {
        "uncut": LOSS[6],
        "cuts": [{"axis": "layers", "size": 3, "loss": LOSS[3]}, {"axis": "layers", "size": 5, "loss": LOSS[5]}],
    }
    rows = json.loads(run.folder.candidates.read_text())
    assert [row["layers"] for row in rows] == [5, 4, 6]  # 4 lies between 3 and 5
    np.testing.assert_allclose([rows[0]["kept"], rows[2]["kept"]], np.exp([1, 0]), rtol=1e-6)
    assert not list(run.folder.path.glob("search/layers*/student"))
    world.search(*given)
    assert world.done == []
    run.folder.marginals.unlink()
    world.search(*given)
    assert world.done == [("measured", 6)]  # the cuts' own numbers are still there


def test_query_groups_are_cut_alone_with_their_heads(world, monkeypatch):
    monkeypatch.setattr(marginals, "solve_cuts", lambda run, cuts: None)
    monkeypatch.setattr(marginals, "solves", lambda job: False)
    monkeypatch.setattr(marginals, "loss_of", lambda run, name: 3.0)
    run = open_run(world.job.override(["search.proxy=losses", "search.space=query_groups=1,3"]), world.folder / "run")
    marginals.measure_axes(run)
    cuts = json.loads(run.folder.marginals.read_text())["cuts"]
    assert cuts == [{"axis": "query_groups", "size": 1, "loss": 3.0}]  # heads are as many in each group
    target = PrunePlan.load(run.folder.candidate("query_groups1").plan).target
    assert (target.num_query_groups, target.num_attention_heads) == (1, world.source.heads_per_group)


def test_nothing_is_done_twice(world):
    world.search()
    world.search()
    assert world.done == []
    world.search("search.distil=2")  # ranked again, from the files; only the second was stopped before
    assert world.done == [("trained", 6, 4), ("trained", 6, 6)]
    world.search("search.steps=9", "search.distil=2")
    assert world.done == [("trained", layers, stop) for stop in (3, 6, 9) for layers in (5, 6)]


@pytest.mark.parametrize("at", TRAINED)
def test_a_killed_ranking_goes_on_and_ends_the_same(world, at):
    world.fail = at
    with pytest.raises(RuntimeError, match="killed"):
        world.search()
    before = [done[1:] for done in world.done if done[0] == "trained"]
    world.fail = None
    run = world.search()
    assert before + [done[1:] for done in world.done] == TRAINED
    assert PrunePlan.load(winner(run).plan).target.num_layers == 4


def test_a_candidate_that_diverges_has_lost_and_is_not_trained_again(world):
    world.diverges = 4  # the winner otherwise
    run = world.search()
    assert [done[1:] for done in world.done if done[0] == "trained"] == [*TRAINED[:3], (5, 4), (6, 4), (5, 6), (6, 6)]
    assert PrunePlan.load(winner(run).plan).target.num_layers == 5
    world.search()
    assert world.done == []


def test_latency_is_measured_where_it_is_asked_for(world, monkeypatch):
    """The deepest two shapes are too slow."""
    monkeypatch.setattr(
        "nemo_minitron.evaluation.forward_seconds", lambda config, **how: config["num_hidden_layers"] / 100
    )
    run = world.search("search.latency=45ms", "search.distil=2")
    listed = json.loads(run.path("search", "candidates.json").read_text())
    assert sorted(row["layers"] for row in listed) == [3, 4]


def test_another_evaluation_measures_anew(world):
    world.search()
    world.search("search.tokens=100")
    assert [done[0] for done in world.done] == ["measured"] * 4  # the ranking's inputs are the same, and so is its end
