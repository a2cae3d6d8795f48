"""The callbacks alone. `test_nemo_script.py` tests what they gather."""

from types import SimpleNamespace

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.hosts import scoring
from nemo_minitron.hosts.nemo import callbacks


def test_a_refusal_on_opening_leaves_nothing_to_close(monkeypatch):
    """Lightning calls `on_exception` before it raises: an error there would hide the refusal's sentence."""

    class Refusing:
        def __init__(self, *_):
            pass

        def __enter__(self):
            raise InputError("nothing in this model is watched for 'fnn'")

    monkeypatch.setattr(scoring, "Collector", Refusing)
    monkeypatch.setattr(scoring, "architecture_of", lambda chunk: None)
    monkeypatch.setattr(scoring, "live_digest", lambda *_: "digest")
    monkeypatch.setattr(callbacks, "chunks_of", lambda trainer: [None])
    trainer = SimpleNamespace(sanity_checking=False, state=SimpleNamespace(fn="validate"))
    importance = callbacks.Importance()
    with pytest.raises(InputError, match="fnn") as refusal:
        importance.on_validation_start(trainer, None)
    importance.on_exception(None, None, refusal.value)
