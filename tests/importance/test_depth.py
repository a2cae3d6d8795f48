"""What a scan of depth takes, and what it refuses."""

import pytest

import nemo_minitron.backend as backend

backend.setup()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from tolerances import CROSS_ENTROPY_FP32  # noqa: E402

from nemo_minitron.errors import InputError  # noqa: E402
from nemo_minitron.importance.depth import Item, read_items  # noqa: E402
from nemo_minitron.importance.depth.choices import _Text  # noqa: E402
from nemo_minitron.importance.depth.head import CHUNK, Head, chunks  # noqa: E402
from nemo_minitron.importance.depth.rows import all_rows, rows_of  # noqa: E402
from nemo_minitron.importance.depth.scan import blocks_of  # noqa: E402

CPU = torch.device("cpu")
CONFIG = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)


@pytest.fixture(autouse=True)
def one_process():
    """Megatron's groups of one process, where no other test has left them."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def test_blocks_of_several_sizes():
    assert blocks_of(4, (2, 1, 2)) == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)]
    assert len(blocks_of(30, (1,))) == 30


@pytest.mark.parametrize(("size", "near"), [(0, 1), (-2, 1), (4, 3), (9, 3), (1.5, 1), ("2", 1)])
def test_illegal_sizes(size, near):
    with pytest.raises(InputError, match=f"legal are 1 to 3, the nearest is {near}"):
        blocks_of(4, (1, size))


def test_labels_are_the_next_tokens_and_the_last_position_does_not_count():
    tokens = torch.tensor([[5, 6, 7], [8, 9, 4]])
    rows = rows_of(tokens, CONFIG, CPU)
    assert rows.labels[:, :2].tolist() == [[6, 7], [9, 4]]
    assert rows.mask.tolist() == [[True, True, False]] * 2
    masked = rows_of({"tokens": tokens, "loss_mask": torch.tensor([[0.0, 1, 1], [1, 0, 1]])}, CONFIG, CPU)
    assert masked.mask.tolist() == [[False, True, False], [True, False, False]]
    given = {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(2, 3), "attention_mask": None}
    assert rows_of(given, CONFIG, CPU).mask.all()
    assert rows_of(given, CONFIG, CPU).labels.tolist() == (tokens + 1).tolist()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": 1}, "a batch has labels, but no 'tokens'"),
        ({}, "a batch has nothing, but no 'tokens'"),
        (torch.zeros(3, dtype=torch.int64), "legal is one shape"),
        ({"tokens": torch.zeros(2, 3), "loss_mask": torch.zeros(2, 2)}, "tensors of [(2, 2), (2, 3)]"),
        ({"tokens": torch.zeros(1, 3), "cu_seqlens": torch.zeros(2)}, "'cu_seqlens'; a scan of depth takes whole"),
        ({"tokens": torch.zeros(1, 3), "attention_mask": torch.zeros(1)}, "'attention_mask'"),
    ],
)
def test_illegal_batches(batch, message):
    with pytest.raises(InputError) as caught:
        rows_of(batch, CONFIG, CPU)
    assert message in str(caught.value)


def test_no_batches():
    with pytest.raises(InputError, match="at least one"):
        list(all_rows([], CONFIG, CPU))


def test_cross_entropy_in_chunks_and_without_padding():
    """Padded columns are large here: left in, they would change every loss."""
    head = Head.__new__(Head)
    head.start, head.width, head.size = 0, 40_000, 1
    torch.manual_seed(0)
    logits, labels = torch.randn(230, 40_000, dtype=torch.bfloat16) * 4, torch.randint(0, 40_000, (230,))
    assert len(chunks(logits)) == -(-230 // (CHUNK // 40_000)) > 1
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    assert torch.allclose(head.losses(logits, labels).double(), expected, rtol=CROSS_ENTROPY_FP32)
    assert head.losses(logits[:0], labels[:0]).shape == (0,)


# -- questions -------------------------------------------------------------------------------------------
GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 1}'


def test_items_are_read_and_empty_lines_skipped(tmp_path):
    (tmp_path / "q.jsonl").write_text(f"{GOOD}\n\n{GOOD}\n")
    assert read_items(tmp_path / "q.jsonl") == [Item("a", ("b", "c"), 1)] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 has no 'context'; it needs context, choices and answer"),
        ('{"context": "a", "answer": 0}', "line 2 has no 'choices'"),
        ('{"context": 3, "choices": ["b", "c"], "answer": 1}', "line 2: context is 3"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "line 2: choices are ['b']; they must be a list of at"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "none empty"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer is 2; legal are 0 to 1, the nearest is 1"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer is True"),
        ('{"context": "a", "choices": ["b", "c"], "answer": "b"}', "answer is 'b'; legal are 0 to 1"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_items(tmp_path / "q.jsonl")
    assert message in str(caught.value)


def test_files_without_questions(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, message in {"empty": "holds no question", "bytes": "cannot be read", "none": "cannot be read"}.items():
        with pytest.raises(InputError, match=message):
            read_items(tmp_path / name)


def _letters(text):
    return [ord(c) for c in text.replace("ee", "E")]


def test_where_a_choice_begins():
    """A token that spans context and choice counts; a first token, which nothing predicts, does not."""
    item = Item("see", ("x", "y"), 0)
    assert _Text(item, " be", _letters).start == 2  # s E | ' ' b e
    assert _Text(Item("se", ("x", "y"), 0), "ed", _letters).start == 1  # s | E d
    assert _Text(Item("", ("x", "y"), 0), "bed", _letters).start == 1
    with pytest.raises(InputError, match="the choice 'b' has no token to score"):
        _Text(Item("", ("x", "y"), 0), "b", _letters)
