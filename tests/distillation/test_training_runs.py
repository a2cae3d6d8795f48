"""What a training's folder says: which settings it was made with, whether it is finished, who its teacher is."""

import dataclasses
import json
import os

import pytest
from checkpoints import save_small
from pico import pico_llama

from nemo_minitron.commands import distill
from nemo_minitron.errors import InputError
from nemo_minitron.job import Distillation, Layout
from nemo_minitron.pruning import HFSource

pytestmark = pytest.mark.nemo  # the host that trains

RECIPE = Distillation(tokens=64, sequence_length=8, global_batch_size=2)  # 4 steps


class Launched:
    """In the place of NeMo's processes: notes what they were told, and leaves a checkpoint of as many steps."""

    def __init__(self, ends_at=None):
        self.calls, self.ends_at = [], ends_at

    def __call__(self, order, worker, log):
        assert order.stage == "distill"
        self.calls.append(order)
        step, out = self.ends_at or order.stop or order.distillation.steps, order.out
        last = f"nemo/checkpoints/step={step - 1}-last"
        save_small(out / last)
        early = {"stopped": step} if self.ends_at else {}
        (out / "last.json").write_text(json.dumps({"checkpoint": last, **early}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "teacher")
    pico_llama(folder / "student", num_hidden_layers=3, seed=1)
    return folder


@pytest.fixture
def train(folder, tmp_path, monkeypatch):
    launched = Launched()
    monkeypatch.setattr(distill, "launch", launched)
    monkeypatch.setattr(distill, "corpus_identity", str)

    def run(recipe=RECIPE, layout=None, **options):
        prefixes = (folder / "train", folder / "held-out")
        models = HFSource(folder / "student"), HFSource(folder / "teacher")
        distill.run_training(*models, prefixes, tmp_path / "out", recipe, layout or Layout(), **options)
        return launched.calls

    run.launched = launched
    return run


def test_a_finished_training_is_not_begun_again_and_one_of_other_settings_is(train):
    assert len(train()) == 1
    assert len(train()) == 1
    assert len(train(dataclasses.replace(RECIPE, lm_weight=0.5))) == 2


def test_a_stop_is_gone_on_from(train):
    train(stop=2)
    assert [call.stop for call in train(stop=2)] == [2]
    assert [call.stop for call in train()] == [2, None]


def test_one_that_ended_early_is_finished(train):
    train.launched.ends_at = 3
    early = dataclasses.replace(RECIPE, validate_every=1, patience=1)
    assert len(train(early)) == 1
    assert len(train(early)) == 1


@pytest.mark.parametrize("change", ["gone", "cut", "other bytes"])
def test_a_finished_training_whose_checkpoint_is_damaged_is_begun_again(train, tmp_path, change):
    train()
    (chunk,) = (tmp_path / "out" / "nemo" / "checkpoints").rglob("*.distcp")
    if change == "gone":
        chunk.unlink()
    elif change == "cut":
        os.truncate(chunk, 1000)
    else:
        chunk.write_bytes(bytes(chunk.stat().st_size))
    assert len(train()) == 2
    assert len(train()) == 2


def test_one_that_went_on_does_not_miss_the_checkpoint_of_its_stop(train, capsys):
    train(stop=2)
    train()
    train()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_damaged_record_of_the_last_checkpoint_is_written_anew(train, tmp_path, text):
    train()
    (tmp_path / "out" / "last.json").write_text(text)
    assert len(train()) == 1
    assert json.loads((tmp_path / "out" / "last.json").read_text()) == {"checkpoint": "nemo/checkpoints/step=3-last"}


def test_a_corrected_teacher_is_trained_first_and_then_taught_from(train, folder):
    layout = Layout(pp=2, first_stage=1)  # of the student's 3 layers; the teacher's 6 divide evenly
    recipe = dataclasses.replace(RECIPE, correction_tokens=32, intermediate="embedding", start="random")
    correction, distillation = train(recipe, layout)
    assert correction.student == correction.teacher == folder / "teacher"
    settings = correction.distillation
    assert (settings.steps, settings.logits_weight, settings.lm_weight) == (2, 0.0, 1.0)
    assert (settings.intermediate, settings.start, settings.correction_tokens) == ("", "pruned", 0)
    assert settings.learning_rate == recipe.correction_learning_rate
    assert (correction.layout.first_stage, distillation.layout.first_stage) == (0, 1)
    assert str(distillation.teacher).endswith("out/teacher/nemo/checkpoints/step=1-last")
    assert distillation.student == folder / "student"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"logits_weight": 0.0}, "both 0"),
        ({"lm_weight": -1.0}, "lm_weight is -1.0"),
        ({"patience": 2}, "needs validate_every"),
        ({"start": "rando"}, "did you mean 'random'"),
        ({"intermediate_loss": "mae"}, "intermediate_loss 'mae' is unknown"),
        ({"loss": "reverse_k"}, "did you mean 'reverse_kl'"),
    ],
)
def test_settings_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Distillation(**settings)


@pytest.mark.parametrize(
    ("layout", "legal"), [(Layout(dp=3), 6), (Layout(pp=4, vp=2), 8), (Layout(pp=2, vp=2, dp=2), 8)]
)
def test_a_batch_that_a_layout_cannot_deal_out_is_refused(layout, legal):
    with pytest.raises(InputError, match=rf"the nearest legal size is {legal}$"):
        Distillation(global_batch_size=7, micro_batch_size=1).check_batch(layout)
    Distillation(global_batch_size=legal, micro_batch_size=1).check_batch(layout)


def test_the_loss_names_of_a_recipe_are_those_of_the_package():
    from nemo_minitron.distillation import losses
    from nemo_minitron.distillation.intermediate import MEASURES
    from nemo_minitron.schema import settings_of
    from nemo_minitron.settings.distillation import Distillation

    known = settings_of(Distillation)

    assert set(known["loss"].legal) == set(losses.__all__)
    assert set(known["intermediate_loss"].legal) == set(MEASURES)


@pytest.mark.parametrize(
    ("layout", "layers", "ends"),
    [
        (Layout(pp=2), 6, (0, 0)),
        (Layout(pp=2), 5, (2, 0)),
        (Layout(pp=2, first_stage=1), 5, (1, 0)),  # it fits as it is
        (Layout(pp=2, first_stage=5), 4, (0, 0)),
        (Layout(pp=4), 30, (7, 7)),
        (Layout(pp=2, vp=2), 6, (2, 0)),
        (Layout(pp=2, vp=3), 8, (0, 0)),  # none: left for `check` to refuse
        (Layout(tp=2), 7, (0, 0)),
    ],
)
def test_stages_for_a_depth(layout, layers, ends):
    found = layout.for_depth(layers)
    assert (found.first_stage, found.last_stage) == ends
