"""One finished run of the main job for all tests of this folder."""

import pytest
from command_line import compressed


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A teacher, a corpus, and `run`: what `minitron compress` made of them."""
    return compressed(tmp_path_factory.mktemp("compress"))
