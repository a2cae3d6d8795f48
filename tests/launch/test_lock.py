"""A folder takes one command at a time: it is refused while a process holds it, and free however that one ends."""

import signal
import subprocess
import sys

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.launch.lock import locked

HOLD = """
import sys, time
from nemo_minitron.launch.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_held_folder_is_refused_until_its_holder_is_gone(tmp_path, number):
    """A killed process removes nothing: with a lock that is a file, made and removed, the second half would fail."""
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"in use by another minitron \(process {holder.pid}\)"), locked(folder):
        pass
    holder.send_signal(number)
    holder.wait(60)
    for _ in range(2):
        with locked(folder):
            pass
