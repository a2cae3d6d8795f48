"""Candidates as rows of plain values, for the table on the screen, `candidates.csv` and the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import JsonFields, JsonObject
from nemo_minitron.search.candidates import Candidate, SearchResult
from nemo_minitron.search.formula import Cost, Formula
from nemo_minitron.search.proxy import near
from nemo_minitron.search.varied import length


def rows_of(result: SearchResult, **serving: object) -> list[JsonObject]:
    """The candidates, best first, then the other shapes on the front; `serving`: arguments of `Architecture.memory`.

    Columns: name, each axis, parameters, without_embeddings, active_parameters (of mixtures), bytes (to serve),
    flops (of a token at the end of the context), kept (the proxy), rank (None beyond the candidates), near_first (the
    proxy cannot tell it from the first one), front.
    """
    best = result.candidates[0].kept
    names = {candidate.name for candidate in result.candidates}
    front = {candidate.name for candidate in result.front}
    shapes = [*result.candidates, *(candidate for candidate in result.front if candidate.name not in names)]
    costs = _costs(shapes[0].architecture, [candidate.sizes for candidate in shapes], serving)
    return [
        {
            "name": candidate.name,
            **candidate.sizes,
            **{column: values[i] for column, values in costs.items()},
            "kept": candidate.kept,
            "rank": i + 1 if i < len(names) else None,
            "near_first": near(candidate.kept, best),
            "front": candidate.name in front,
        }
        for i, candidate in enumerate(shapes)
    ]


def source_row(source: Architecture, axes: Sequence[str], **serving: object) -> JsonObject:
    """The uncut model in the same columns."""
    uncut = Candidate({name: length(source, name) for name in axes}, source, 1.0)
    return rows_of(SearchResult([uncut], [], 1, 1), **serving)[0] | {"name": "uncut", "rank": None}


def _costs(shape: Architecture, sizes: Sequence[Mapping[str, int]], serving: JsonFields) -> dict[str, list[int]]:
    """The costs of a shape with other sizes, by formula: to count an Architecture with hundreds of experts takes
    long."""
    costs: dict[str, Cost] = {
        "parameters": lambda a: a.parameters(),
        "without_embeddings": lambda a: a.parameters(embeddings=False),
        "active_parameters": lambda a: a.parameters(active=True),
        "bytes": lambda a: a.memory(**serving),
        "flops": lambda a: a.flops_per_token(serving["context"]),
    }
    if not shape.num_moe_experts:
        del costs["active_parameters"]
    columns = {name: np.array([row[name] for row in sizes]) for name in sizes[0]}
    return {name: Formula(cost, shape, tuple(columns))(columns).tolist() for name, cost in costs.items()}
