"""The rows that a training with a cached teacher reads are the same for every seed and epoch.

Two mutations were tried by hand, and each makes tests here fail: a row's offset counted from the stream's start instead
of its document's; one permutation for all epochs.
"""

import numpy as np
import pytest
from corpora import write_indexed

import nemo_minitron.backend as backend

LENGTHS, LENGTH = (3, 21, 8, 1, 8, 0, 30), 8  # rows that begin within, at the end of, and across documents


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A function that makes a dataset of `rows` rows for so many samples, and the whole stream."""
    backend.setup()
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from nemo_minitron.megatron.rows import stream_rows

    prefix = tmp_path_factory.mktemp("rows") / "text"
    stream = np.arange(sum(LENGTHS))  # each token is its own position, so a row says where it comes from
    write_indexed(prefix, np.split(stream, np.cumsum(LENGTHS)[:-1]))

    class Tokenizer:
        eod, pad = 0, 0

        unique_identifiers = {"class": "none"}  # noqa: RUF012

    def make(rows, samples=None, seed=1):
        config = GPTDatasetConfig(
            random_seed=seed, sequence_length=LENGTH, tokenizer=Tokenizer(), path_to_cache=None,
            reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        )  # fmt: skip
        indexed = IndexedDataset(str(prefix))
        indices = np.arange(len(LENGTHS), dtype=np.int32)
        return stream_rows(rows)(indexed, str(prefix), indices, samples, Split.train, config)

    return make, stream


def test_each_epoch_deals_out_every_row_of_the_stream_once(dataset):
    make, stream = dataset
    rows = (len(stream) - 1) // LENGTH
    dataset = make(rows, 2 * rows + 1)
    samples = [dataset[i] for i in range(len(dataset))]
    assert len(samples) == 3 * rows  # whole epochs, at least as many samples as are asked for
    assert [int(sample["epoch"]) for sample in samples] == [0] * rows + [1] * rows + [2] * rows
    orders = [[int(s["tokens"][0]) // LENGTH for s in samples[i * rows : (i + 1) * rows]] for i in range(3)]
    assert all(sorted(order) == list(range(rows)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    for sample in samples:
        start = int(sample["tokens"][0])
        assert start % LENGTH == 0
        assert np.array_equal(sample["tokens"], stream[start : start + LENGTH])
        assert np.array_equal(sample["labels"], stream[start + 1 : start + LENGTH + 1])
        assert sample["loss_mask"].sum() == LENGTH


def test_a_seed_and_the_number_of_rows_choose_the_order_and_the_samples_do_not(dataset):
    make, _ = dataset
    order = [list(rows.shuffle_index) for rows in (make(8, 8), make(8, 20), make(8, 8, seed=2), make(8))]
    assert order[1][:8] == order[0] == order[3]
    assert order[2] != order[0]
    assert {int(make(5)[i]["tokens"][0]) for i in range(5)} == {0, 8, 16, 24, 32}  # the first rows of the stream
