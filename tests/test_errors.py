"""What a message quotes of a file stays text on a terminal, and short."""

import pytest

from nemo_minitron.errors import LONGEST, InputError, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünd 日本 🙂", "plain, ünd 日本 🙂"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\nb\rc\td\0", r"a\nb\rc\td\x00"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
        ("\u2028\ud800", r"\u2028\ud800"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown
    assert str(InputError(text)) == shown


def test_a_message_is_never_long():
    text = str(InputError("the file " + "x" * 10**6 + " is damaged"))
    assert len(text) < LONGEST + 20
    assert text.startswith("the file xxx")
    assert text.endswith("xxx is damaged")
