"""The gates of a run as rows of a table."""

from __future__ import annotations

from nemo_minitron.artifacts.json_types import JsonFields
from nemo_minitron.export import formatting


def gate_rows(gates: JsonFields) -> list[list[str]]:
    """(gate, figure, limit, result, meaning) of each gate; no row if the run has none."""
    return [
        [gate["name"], _figure(gate), _share(gate["limit"]), gate["state"], gate["note"]]
        for gate in gates.get("gates", ())
    ]


def gate_note(gates: JsonFields) -> str:
    """What the gates read, in one sentence."""
    if not gates:
        return ""
    rows, length = (formatting.count(gates[name]) for name in ("rows", "sequence_length"))
    return f"On {rows} held-out rows of {length} tokens, in {gates['precision']}, with plain slices of the teacher."


def _figure(gate: JsonFields) -> str:
    """A loss with its standard error, or a share of the logits' spread."""
    if gate["figure"] is None or gate["limit"] is not None:
        return _share(gate["figure"])
    error = "" if gate["error"] is None else f" ± {gate['error']:.3f}"
    return f"{formatting.number(gate['figure'])}{error} nats"


def _share(value: float | None) -> str:
    return formatting.NONE if value is None else f"{value:.1e}" if value else "0"
