"""What `minitron compensate` does with a stage that refuses late. No refusal is known that comes behind the least
squares, so the stage is this test's."""

from types import SimpleNamespace

import pytest

from nemo_minitron.commands import compensate
from nemo_minitron.errors import InputError
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.layout import Layout


def test_it_leaves_nothing_of_what_it_began(tmp_path, monkeypatch):
    out, others = tmp_path / "late[1]", {tmp_path / name for name in ("late[1].start.bak", "late1.parts", "late")}

    def refuse(*_):
        for end in (".parts", ".start.parts"):
            (tmp_path / f"late[1]{end}").mkdir()
        for file in [*others, *(tmp_path / f"late[1]{end}" for end in (".solved", ".start"))]:
            file.write_text("begun")
        raise InputError("late")

    monkeypatch.setattr(compensate, "launch", refuse)
    with pytest.raises(InputError, match="late"):
        compensate.solve_for(
            SimpleNamespace(path=tmp_path), {tmp_path / "plan": out}, out, Calibration(6, 36, 2), Layout()
        )
    assert {*tmp_path.iterdir()} == others
