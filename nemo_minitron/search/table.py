"""Candidates as rows of plain values: the table on the screen, `candidates.csv`, the data of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import axis
from nemo_minitron.search.candidates import Candidate, Found


def rows_of(found: Found, **serving: Any) -> list[dict[str, Any]]:
    """The candidates, best first, then what else lies on the front; `serving` as `Architecture.memory` takes it."""
    names = {candidate.name for candidate in found.candidates}
    front = {candidate.name for candidate in found.front}
    others = [candidate for candidate in found.front if candidate.name not in names]
    ranks = [*range(1, len(names) + 1), *[None] * len(others)]
    return [
        {**_row(candidate, **serving), "rank": rank, "front": candidate.name in front}
        for rank, candidate in zip(ranks, [*found.candidates, *others], strict=True)
    ]


def source_row(source: Architecture, axes: Sequence[str], **serving: Any) -> dict[str, Any]:
    """The uncut model in the same columns."""
    sizes = {name: axis(name).length(source) for name in axes}
    return _row(Candidate(sizes, source, 1.0), **serving) | {"name": "uncut", "rank": None, "front": False}


def _row(candidate: Candidate, **serving: Any) -> dict[str, Any]:
    """`bytes`: to serve; `flops`: of a token at the end of the context."""
    a = candidate.architecture
    active = {"active_parameters": a.parameters(active=True)} if a.num_moe_experts else {}
    return {
        "name": candidate.name,
        **candidate.sizes,
        "parameters": a.parameters(),
        "without_embeddings": a.parameters(embeddings=False),
        **active,
        "bytes": a.memory(**serving),
        "flops": a.flops_per_token(serving["context"]),
        "kept": candidate.kept,
    }
