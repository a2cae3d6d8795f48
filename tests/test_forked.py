"""`forked.py` forks the commands of the tests. Executed, each of them and each of its stages loads NeMo anew."""

import os
import sys

import forked
import pytest

COMMAND = [sys.executable, "-m", "nemo_minitron.cli", "plan"]
STARTED = {"args": COMMAND, "env": None, "shell": False, "pass_fds": (), "cwd": None, "start_new_session": False}


def test_a_command_is_forked_whatever_the_tests_have_imported():
    """Once lm-eval, which a test's file imports, set a variable that such libraries read early."""
    pytest.importorskip("lm_eval")
    assert forked.early(dict(os.environ)) == forked.early(forked.BORN_WITH)
    assert forked.order_of(STARTED)["module"] == "nemo_minitron.cli"


def test_a_command_in_an_environment_that_libraries_read_early_is_executed():
    assert forked.order_of(STARTED | {"env": os.environ | {"PYTHONPATH": "elsewhere"}}) is None
