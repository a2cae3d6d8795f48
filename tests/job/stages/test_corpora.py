"""The corpora of a run: where their tokens lie, which split is read, and what makes them anew."""

import json

import pytest
from words import save_tokenizer

from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.errors import InputError
from nemo_minitron.job import Data, Job
from nemo_minitron.job.run import open_run
from nemo_minitron.job.stages import corpora

TEXTS = [f"the model number {i} reads {i * 7} words and ends." for i in range(40)]


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", TEXTS, 400)
    return tmp_path / "tokenizer"


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


@pytest.fixture
def both(tmp_path):
    """A `datasets` folder of two splits: 3 documents to train on, 2 held out."""
    datasets = pytest.importorskip("datasets")
    parts = {"train": TEXTS[:3], "test": ["held out one", "held out two"]}
    datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": t}) for name, t in parts.items()}).save_to_disk(
        str(tmp_path / "both")
    )
    return tmp_path / "both"


def tokenised(folder, data, tokenizer):
    run = open_run(Job(name="pico", teacher="t", data=data, keep={"ffn": 64}), folder)
    corpora.tokenise(run, tokenizer)
    return run


def test_indexed_files_are_used_where_they_lie(tmp_path, jsonl, tokenizer):
    """As before the record: with `data/train` in place of the record the prefix is missing and Tokens refuses."""
    from nemo_minitron.data import Tokens, build

    made = build(jsonl, tokenizer, tmp_path / "elsewhere" / "wiki")
    data = Data(train=str(made.prefix), test=f"{made.prefix}.bin")
    run = tokenised(tmp_path / "run", data, tokenizer)
    assert {path.name for path in run.path("data").iterdir()} == {"corpora.json"}
    assert corpora.outputs(data) == ("data/corpora.json",)
    for split in ("train", "test", "calibration"):
        assert corpora.prefix(run, split) == made.prefix.resolve()
        assert Tokens(corpora.prefix(run, split)).tokens == made.tokens


def test_a_source_is_tokenised_once_and_the_folder_may_move(tmp_path, jsonl, tokenizer):
    data = Data(train=str(jsonl), test=str(jsonl))
    run = tokenised(tmp_path / "run", data, tokenizer)
    assert sorted(path.name for path in run.path("data").glob("*.bin")) == ["train.bin"]
    assert corpora.outputs(data) == ("data/corpora.json", "data/train.bin", "data/train.idx")
    moved = run.folder.path.rename(tmp_path / "moved")
    run.folder = RunFolder(moved)
    assert corpora.prefix(run, "calibration") == moved / "data" / "train"


def test_held_out_text_is_never_the_train_split(tmp_path, both, tokenizer):
    """Reading `test` as `train` reads, the default until now, gives 3 documents in the place of 2."""
    from nemo_minitron.data import Tokens

    run = tokenised(tmp_path / "run", Data(train=str(both), test=str(both)), tokenizer)
    assert [len(Tokens(corpora.prefix(run, split))) for split in ("train", "test", "calibration")] == [3, 2, 3]
    run = tokenised(tmp_path / "named", Data(train=f"{both}@test", test=f"{both}@train"), tokenizer)
    assert [len(Tokens(corpora.prefix(run, split))) for split in ("train", "test")] == [2, 3]
    with pytest.raises(InputError, match="no split 'validation': legal are train, test"):
        tokenised(tmp_path / "none", Data(train=str(both), test=f"{both}@validation"), tokenizer)


def test_a_folder_without_a_test_split_is_refused_not_read_as_one(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(InputError, match="no split 'test': legal are train"):
        tokenised(tmp_path / "run", Data(train=str(tmp_path / "one"), test=str(tmp_path / "one")), tokenizer)


def test_what_a_source_holds_is_in_its_identity(tmp_path, jsonl, both, tokenizer):
    """A digest over the recipe's words alone, as it was, is the same after each of these changes."""
    from nemo_minitron.data import build

    prefix = build(jsonl, tokenizer, tmp_path / "wiki").prefix
    sources = [str(jsonl), str(both), str(prefix), f"{prefix}.idx"]
    before = [corpora.identity(source) for source in sources]
    assert [corpora.identity(source) for source in sources] == before
    assert corpora.identity(f"{both}@test") != corpora.identity(f"{both}@train")
    jsonl.write_text(jsonl.read_text().replace("words", "lines"))
    next((both / "train").glob("*.arrow")).write_bytes(b"other")
    build(jsonl, tokenizer, prefix)
    after = [corpora.identity(source) for source in sources]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert json.dumps(after)  # plain values
