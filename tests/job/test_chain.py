"""Chains of students: the recipe's steps, the jobs that they become, and what is refused before anything runs."""

import json

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.job import Data, Job, Step


@pytest.fixture
def chain():
    steps = (Step("80", keep={"ffn": 80}), Step("64", keep={"ffn": 64}, rounds=2, distillation={"tokens": 500}))
    return Job(name="pico", teacher="teacher", data=Data("train.jsonl", "test.jsonl"), chain=steps)


def test_a_chain_survives_json_and_overrides_reach_its_steps(chain):
    assert Job.from_dict(json.loads(json.dumps(chain.as_dict()))) == chain
    settings = ["chain.0.keep.layers=5", "chain.1.distillation.learning_rate=0.1", "chain.1.search.params=1M"]
    changed = chain.override([*settings, "chain.1.teacher=previous"])
    assert changed.chain[0].keep == {"ffn": 80, "layers": 5}
    assert changed.chain[1].distillation == {"tokens": 500, "learning_rate": 0.1}
    assert (changed.chain[1].search.params, changed.chain[1].teacher) == ("1M", "previous")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("chain.2.keep.ffn=3", "no key 'chain.2.keep.ffn'; did you mean 'chain.1.keep.ffn'"),
        ("chain.0.kep.ffn=3", "did you mean 'chain.0.keep.ffn'"),
        ("chain.0.round=3", "did you mean 'chain.0.rounds'"),
        ("chain.0=3", "no key 'chain.0'"),
        ("chain=3", "'chain.0' must be a group of settings, not 3"),
        ("chain.0.rounds=0", "rounds is 0; the nearest legal value is 1"),
        ("chain.0.rounds=x", "'chain.0.rounds' is 'x'; it must be an int"),
        ("chain.0.calibration=3", "is a group of settings; set one of chain.0.calibration.NAME"),
        ("chain.0.teacher=frist", "teacher 'frist' is unknown; did you mean 'first'"),
        ("chain.0.name=a/b", "step 'a/b' cannot name a folder"),
        ("chain.0.name=chain.json", "step 'chain.json' cannot name a folder"),
        ("chain.0.name=64", "'chain.0.name' is 64; it must be a str"),
        ('chain.0.name="64"', "two steps of the chain are named '64'"),
        ("keep.ffn=3", "take 'keep' out of the job"),
        ("rounds=2", "take 'rounds' out of the job"),
        ("learns_from=other", "take 'learns_from' out of the job"),
    ],
)
def test_bad_steps_are_refused(chain, setting, words):
    with pytest.raises(InputError, match=words):
        chain.override([setting])


def test_no_job_has_less_than_a_round(chain):
    with pytest.raises(InputError, match="rounds is 0; the nearest legal value is 1"):
        Job(name="pico", teacher="teacher", data=chain.data, keep={"ffn": 64}, rounds=0)
