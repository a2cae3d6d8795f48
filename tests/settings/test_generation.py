"""Text that a teacher writes for its student: prompts, refusals, the dry run, and the stage, broken off and resumed."""

import dataclasses
import json

import pytest
from pico import pico_llama
from words import save_tokenizer

from nemo_minitron import progress
from nemo_minitron.artifacts.files import file_digest
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.errors import InputError
from nemo_minitron.job import Data, Evaluation, Generation, Job
from nemo_minitron.job.dry_run import describe
from nemo_minitron.job.run import execute, open_run
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.stages.compress import stages
from nemo_minitron.job.stages.generate import WRITE, gather, prompts_of, trained_on

TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(60)]
SETTINGS = Generation(documents=6, prompt_tokens=5, new_tokens=7, batch_size=2, seed=3)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    pico_llama(folder / "teacher", vocab_size=509)
    save_tokenizer(folder / "teacher", TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    corpus = str(folder / "corpus.jsonl")
    return Job(
        name="pico", teacher=str(folder / "teacher"), data=Data(corpus, corpus), keep={"ffn": 66},
        evaluation=Evaluation(precision="fp32"), generation=SETTINGS,
    )  # fmt: skip


def run_of(job, folder):
    """A run whose corpora are there, and the stages as far as the text."""
    run = open_run(job, folder)
    return run, [stage for stage in stages(job) if stage.name in ("data", "generate")]


def test_the_dry_run_says_what_is_written(job):
    text = describe(job)
    assert "writes 6 documents, each 5 tokens of the corpus and up to 7 tokens of its own" in text
    assert "evaluate, generate, distill" in text
    assert "generate" not in describe(dataclasses.replace(job, generation=Generation())).split("stages: ")[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["generation.prompts=/nowhere.jsonl"], "prompts '/nowhere.jsonl' is no file"),
        (["distillation.correction_tokens=512"], "correction_tokens=512 would teach the teacher the text"),
        (["generation.top_p=1.5"], "top_p is 1.5; it must be above 0 and at most 1"),
        (["generation.temperature=0"], "temperature is 0.0; it must be above 0"),
        (["generation.new_tokens=252"], "up to 257 tokens .* has 256 positions; the nearest legal new_tokens is 251"),
        (["generation.documents=-1"], "documents is -1; the nearest legal value is 0"),
    ],
)
def test_refusals(job, overrides, words):
    with pytest.raises(InputError, match=words):
        describe(job.override(overrides))


def test_a_run_that_is_broken_off_ends_with_the_same_text(job, tmp_path, monkeypatch):
    """The first of three batches is written, and marked; the second run must keep it and write the other two."""
    whole, wanted = run_of(job, tmp_path / "whole")
    execute(whole, wanted)
    broken, _ = run_of(job, tmp_path / "broken")

    def stop(line):
        if line.startswith("    > generate: document 2/6"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(broken, "say", stop)
        patch.setattr(progress, "SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            execute(broken, wanted)
    (parts,) = broken.folder.path.glob(f"{RunFolder.generation}.*")
    (first,) = parts.iterdir()
    first.write_text(first.read_text().replace('"continuation": "', '"continuation": "MARK'))
    execute(broken, wanted)
    texts = [run.path(f"{RunFolder.generated}.jsonl").read_text() for run in (whole, broken)]
    assert texts[0].count("\n") == 6
    assert texts[1].count("MARK") == 2
    assert texts[1].replace("MARK", "") == texts[0]
    assert not parts.exists()
    record = json.loads(broken.path(f"{RunFolder.generation}.json").read_text())
    assert (record["documents"], record["empty"]) == (6, 0)
    assert record["text"] == file_digest(broken.path(f"{RunFolder.generated}.jsonl"))


def test_the_student_is_trained_on_what_was_written(job, tmp_path):
    from nemo_minitron.data import Tokens, load_tokenizer

    run, wanted = run_of(job, tmp_path / "run")
    execute(run, wanted)
    tokenizer, tokens = load_tokenizer(job.teacher), Tokens(trained_on(run))
    written = [json.loads(line)["text"] for line in run.path(f"{RunFolder.generated}.jsonl").read_text().splitlines()]
    assert [tokenizer.decode(tokens[i][:-1], clean_up_tokenization_spaces=False) for i in range(6)] == written
    corpus = Tokens(corpora.prefix(run, "train"))
    prompts = prompts_of(SETTINGS, corpus, tokenizer)
    stream = corpus.stream(0, corpus.tokens).tolist()
    for prompt, text in zip(prompts, written, strict=True):
        assert len(prompt) == 5
        assert any(stream[i : i + 5] == prompt for i in range(0, len(stream), 5))
        assert text.startswith(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))
    assert len({tuple(prompt) for prompt in prompts}) > 1
    without = dataclasses.replace(run, job=dataclasses.replace(job, generation=Generation()))
    assert trained_on(without) == corpora.prefix(run, "train")


def test_prompts_are_refused_where_there_are_none(job, tmp_path):
    from nemo_minitron.data import build, load_tokenizer

    tokenizer = load_tokenizer(job.teacher)
    corpus = build(job.data.train, tokenizer, tmp_path / "corpus")
    (tmp_path / "prompts.jsonl").write_text('{"text": "the model"}\n{"text": "words"}\n')
    given = dataclasses.replace(SETTINGS, prompts=str(tmp_path / "prompts.jsonl"), documents=3)
    texts = [tokenizer.decode(ids) for ids in prompts_of(given, corpus, tokenizer)]
    assert texts == ["the model", "words", "the model"]
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no text"):
        prompts_of(given, corpus, tokenizer)
    with pytest.raises(InputError, match="no document of the corpus has 400 tokens for a prompt"):
        prompts_of(dataclasses.replace(SETTINGS, prompt_tokens=400), corpus, tokenizer)
    with pytest.raises(InputError, match=r"documents is 5000; the nearest legal number is \d+"):
        prompts_of(dataclasses.replace(SETTINGS, documents=5000), corpus, tokenizer)


def test_documents_without_a_word_are_left_out(tmp_path):
    rows = [{"prompt": "a", "continuation": " b"}, {"prompt": "c", "continuation": "\n"}]
    assert gather(rows, tmp_path / "text.jsonl") == {"documents": 1, "empty": 1}
    assert json.loads((tmp_path / "text.jsonl").read_text()) == {"text": "a b"}
    with pytest.raises(InputError, match="wrote nothing after any of 1 prompts"):
        gather(rows[1:], tmp_path / "text.jsonl")


def test_what_decides_the_text_decides_the_stage(job, tmp_path):
    run, _ = run_of(job, tmp_path / "run")
    other = dataclasses.replace(run, job=job.override(["generation.seed=4"]))
    assert WRITE.inputs(run) == WRITE.inputs(dataclasses.replace(run, job=job.override(["distillation.seed=4"])))
    assert WRITE.inputs(run) != WRITE.inputs(other)
