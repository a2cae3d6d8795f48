"""The callbacks alone. `test_nemo_script.py` tests what they gather."""

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.hosts.nemo import callbacks


def test_a_refusal_on_opening_leaves_nothing_to_close(monkeypatch):
    """Lightning calls `on_exception` before it raises: an error there would hide the refusal's sentence."""

    class Refusing:
        def __init__(self, *_):
            pass

        def __enter__(self):
            raise InputError("nothing in this model is watched for 'fnn'")

    monkeypatch.setattr(callbacks, "Collector", Refusing)
    monkeypatch.setattr(callbacks, "architecture_of", lambda chunk: None)
    importance = callbacks.Importance()
    with pytest.raises(InputError, match="fnn") as refusal:
        importance._open([None])
    importance.on_exception(None, None, refusal.value)
