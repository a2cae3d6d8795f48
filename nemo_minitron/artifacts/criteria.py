"""Statistics in a file -> the numbers of a criterion, without running the model again (numpy alone).

States are keyed `statistic/batch,sequence/field`, float64 [rows, 2, ...]: the samples are dealt to two halves
by their content, so that the halves' rankings can be compared. Derived scores are written once, here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.statistics import AGGREGATIONS, ROUTED, TOKENS, State, aggregation_of, criterion
from nemo_minitron.errors import InputError

States = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]
NORMS = ("all", "layers")


def check_norms(norms: str) -> None:
    """Raises InputError unless `norms` says which norms `hidden` sums."""
    if norms not in NORMS:
        raise InputError(f"norms '{norms}' is unknown; legal are {' and '.join(NORMS)}")


def pairs_of(states: States) -> dict[str, list[tuple[str, str]]]:
    """Statistic -> the (over samples, over the sequence) pairs that are there."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in states:
        try:
            statistic, pair, _ = key.split("/")
            batch, sequence = pair.split(",")
        except ValueError:
            raise InputError(
                f"'{key}' is no state of a statistic; it must read statistic/batch,sequence/field"
            ) from None
        if (batch, sequence) not in found.setdefault(statistic, []):
            found[statistic].append((batch, sequence))
    return found


def check_states(states: States) -> None:
    """Raises InputError unless each statistic has all fields of its aggregation, floats of one shape [rows, 2, ...]."""
    for statistic, pairs in pairs_of(states).items():
        for pair in pairs:
            over_samples, over_sequence = pair
            known = {over_samples} <= {*AGGREGATIONS, TOKENS, ROUTED} and over_sequence in AGGREGATIONS
            names = [f"{statistic}/{','.join(pair)}/{field}" for field in aggregation_of(pair).fields] if known else []
            shapes = {states[name].shape for name in names if name in states and states[name].dtype.kind == "f"}
            whole = names and all(name in states for name in names) and len(shapes) == 1
            if not whole or any(len(shape) < 2 or shape[1] != 2 for shape in shapes):
                raise InputError(f"the statistic '{statistic}/{','.join(pair)}' is not whole")


def criteria_of(states: States) -> list[str]:
    """The criteria that every statistic over samples can be finished under."""
    sets = [_names(pairs) for pairs in pairs_of(states).values()]
    kept = sorted((names for names in sets if names), key=len)
    return [name for name in kept[0] if all(name in names for names in kept)] if kept else []


def _names(pairs: list[tuple[str, str]]) -> list[str]:
    """The criteria that one statistic serves: of routed tokens all that have its aggregation over the sequence."""
    found = [(batch, s) for over, s in pairs for batch in (AGGREGATIONS if over == ROUTED else (over,))]
    return [",".join(pair) for pair in found if pair[0] != TOKENS]


def state_of(states: States, statistic: str, pair: tuple[str, str], half: int | None = None) -> State:
    """The state [rows, ...] of both halves together, or of one."""
    aggregation = aggregation_of(pair)
    fields = [states[f"{statistic}/{','.join(pair)}/{field}"] for field in aggregation.fields]
    first, second = (tuple(field[:, k] for field in fields) for k in (0, 1))
    return aggregation.merge(first, second) if half is None else (first, second)[half]


def finish(states: States, name: str, half: int | None = None) -> Arrays:
    """Statistic -> its numbers, fp32 [rows, ...], under a criterion. Raises InputError where it was not gathered."""
    wanted, numbers = criterion(name), {}
    for statistic, pairs in pairs_of(states).items():
        over = pairs[0][0]
        pair = {TOKENS: (TOKENS, "mean"), ROUTED: (ROUTED, wanted[1])}.get(over, wanted)
        if pair not in pairs:
            raise InputError(f"'{name}' was not gathered; these scores have {' and '.join(criteria_of(states))}")
        numbers[statistic] = aggregation_of(pair).finish(state_of(states, statistic, pair, half)).astype(np.float32)
    return numbers


def derive(numbers: Arrays, architecture: Architecture, norms: str = "all") -> Arrays:
    """Adds what follows: ffn and heads of their other statistics, query groups, and `hidden` of the norms."""
    found = dict(numbers)
    if "ffn" not in found and "ffn_pre_activation" in found:
        found["ffn"] = found["ffn_pre_activation"]
    if "heads" not in found and "head_channels" in found:
        channels = found["head_channels"]
        channels = channels.reshape(len(channels), architecture.num_attention_heads, -1)  # MLA's are not head_dim wide
        found["heads"] = np.linalg.norm(channels.astype(np.float64), axis=-1).astype(np.float32)
    if "heads" in found:
        grouped = found["heads"].reshape(len(found["heads"]), architecture.num_query_groups, -1)
        found["query_groups"] = grouped.sum(-1, dtype=np.float64).astype(np.float32)
    if "norms" in found:
        summed = found["norms"] if norms == "all" else found["norms"][:-1]
        found["hidden"] = summed.sum(0, dtype=np.float64).astype(np.float32)
    return found


def merge(a: States, b: States) -> Arrays:
    """The states of both runs' samples together. Raises InputError where they keep different statistics."""
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())[0].rpartition("/")[0]
        raise InputError(f"the two runs did not gather the same statistics; only one has '{odd}'")
    merged: Arrays = {}
    for statistic, pairs in pairs_of(a).items():
        for pair in pairs:
            aggregation, name = aggregation_of(pair), f"{statistic}/{','.join(pair)}"
            parts = (tuple(run[f"{name}/{field}"] for field in aggregation.fields) for run in (a, b))
            fields = aggregation.merge(*parts)
            merged |= {f"{name}/{field}": x for field, x in zip(aggregation.fields, fields, strict=True)}
    return merged
