"""NeMo's data module over indexed files: what it deals out, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forked
import pytest

from nemo_minitron.data import build
from nemo_minitron.errors import InputError
from nemo_minitron.hosts.nemo.data_module import data_module

slow = pytest.mark.slow
EOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_level, texts):
    """Two corpora, and a model folder of which only the tokenizer may travel."""
    folder = tmp_path_factory.mktemp("module")
    byte_level.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "model.safetensors").write_bytes(b"weights")
    for name, times in (("train", 4), ("test", 1)):
        lines = [json.dumps({"text": f"{i} {text}"}) for i in range(times) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        build(folder / f"{name}.jsonl", byte_level, folder / name)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    script = Path(__file__).with_name("drive_module.py")
    done = forked.run([sys.executable, str(script), str(folder)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


@slow
def test_a_sample_is_tokens_labels_positions_and_a_mask_of_losses(result):
    assert result["keys"] == ["labels", "loss_mask", "position_ids", "tokens"]
    assert result["dtypes"] == ["torch.float32", "torch.int64"]
    assert result["shift"]


@slow
def test_every_data_parallel_size_sees_the_same_global_batches_in_the_same_order(result):
    worlds = result["worlds"]
    assert len(worlds["1"]) == 5
    assert worlds["2"] == worlds["1"]
    assert worlds["4"] == worlds["1"]
    assert result["other_seed"] != worlds["1"]


@slow
def test_the_end_of_a_document_stays_a_token_that_is_learnt(result):
    """Padding is EOS in this tokenizer: GPTDataset itself makes each EOS a 0 and masks its loss."""
    assert EOS in result["tokens"]
    assert 0 not in result["tokens"]
    assert result["loss_mask"] == 16


@slow
def test_validation_is_whole_and_the_vocabulary_untouched(result, folder):
    from nemo_minitron.data import Tokens

    samples = (Tokens(folder / "test").tokens - 1) // 16
    assert result["validation"][0] == samples
    assert result["vocabulary"] == 400


@slow
def test_the_context_carries_the_tokenizer_and_no_weights(result):
    assert "tokenizer.json" in result["context"]
    assert "model.safetensors" not in result["context"]


@slow
def test_a_torn_index_is_built_anew(result):
    """Half of a file, as a kill leaves it, or blocks without content, as a power cut does."""
    assert len(result["torn"]) == 20
    assert all(result["torn"].values()), result["torn"]


@slow
def test_the_index_lies_beside_the_corpus_under_its_digest(result, folder):
    index = Path(result["index"])
    assert index.parent == folder / "train.index"
    assert any(file.name.endswith("shuffle_index.npy") for file in index.iterdir())


@slow
def test_nemo_trains_on_it_in_order_and_leaves_the_models_vocabulary(result):
    assert result["fit"] == {"step": 2, "seen": list(range(8)), "rows": 448}


def refused(folder, **options) -> str:
    sizes = {"sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 4} | options
    with pytest.raises(InputError) as caught:
        data_module(folder / "train", folder / "test", tokenizer=folder / "tokenizer", **sizes)
    return str(caught.value)


def test_sizes_that_do_not_fit_are_refused(folder):
    assert "give a global batch of 4" in refused(folder, micro_batch_size=2, global_batch_size=5)
    assert "the training corpus gives 0 samples" in refused(folder, sequence_length=100_000)
    assert "the validation corpus" in refused(folder, global_batch_size=1_000)


def test_another_tokenizers_corpus_is_refused(folder, sentencepiece, tmp_path):
    sentencepiece.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another tokenizer"):
        data_module(
            folder / "train",
            folder / "test",
            tokenizer=tmp_path / "other",
            sequence_length=16,
            micro_batch_size=1,
            global_batch_size=4,
        )
