"""The rows of a reconstruction: what is held out, what a step takes, and what cannot be."""

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.job import Cutting
from nemo_minitron.schema import Unasked
from nemo_minitron.settings.reconstruction import held_out, rows_of_step


def test_whole_steps_are_held_out():
    assert [held_out(rows, 1) for rows in (2, 16, 31, 32, 1024)] == [1, 1, 1, 2, 64]
    assert [held_out(rows, 4) for rows in (8, 32, 128, 1024)] == [4, 4, 8, 64]


def test_a_step_is_shared_by_the_ranks():
    assert rows_of_step(32, 4, 2) == 4
    assert rows_of_step(32, Unasked(1), 8) == 8  # nobody asked for one row
    assert type(rows_of_step(32, Unasked(1), 1)) is int


@pytest.mark.parametrize(
    ("rows", "batch", "ranks", "message"),
    [
        (32, 1, 2, "reconstruct_batch=1 rows do not divide among 2 data-parallel ranks; the nearest legal is 2"),
        (32, 7, 4, "the nearest legal is 8"),
        (7, 4, 2, "7 calibration rows are fewer than two steps of reconstruct_batch=4"),
        (3, Unasked(1), 2, "3 calibration rows are fewer than two steps of reconstruct_batch=2"),
    ],
)
def test_refusals(rows, batch, ranks, message):
    with pytest.raises(InputError, match=message):
        rows_of_step(rows, batch, ranks)


def test_it_starts_from_the_least_squares():
    with pytest.raises(InputError, match="reconstruct starts from the least squares"):
        Cutting(reconstruct=1, compensate=False)


def test_the_settings_that_decide():
    """A job that does not reconstruct is the one that it was."""
    plain, fits = Cutting(reconstruct_batch=8), Cutting(reconstruct=2, reconstruct_batch=8)
    assert plain.deciding() == Cutting().deciding()
    assert plain.fitting() == Cutting().fitting() == Cutting().ridge
    assert fits.deciding() != plain.deciding()
    assert fits.fitting() != Cutting(reconstruct=3, reconstruct_batch=8).fitting()
