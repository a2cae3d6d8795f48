"""From the statistics in a file to the numbers of a criterion, without running the model again (numpy alone).

States are keyed `statistic/batch,sequence/field`, float64 [rows, 2, ...]. The content of a sample decides which of two
halves it belongs to, so that the rankings of the halves can be compared. Derived scores are computed here alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.statistics import AGGREGATIONS, ROUTED, TOKENS, State, aggregation_of, criterion
from nemo_minitron.errors import InputError, nearest

States = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]
NORMS = ("all", "layers")
REAP, FREQUENCY = "reap", "frequency"
EXPERTS = ("criterion", REAP, FREQUENCY)
"""What scores an expert: the calibration's criterion, or one of those of `experts_by`."""


def check_norms(norms: str) -> None:
    """Raises InputError unless `norms` says which norms `hidden` sums."""
    if norms not in NORMS:
        raise InputError(f"norms '{norms}' is unknown; legal are {' and '.join(NORMS)}")


def pairs_of(states: States) -> dict[str, list[tuple[str, str]]]:
    """Statistic -> its (over samples, over the sequence) pairs."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for key in states:
        try:
            statistic, pair, _ = key.split("/")
            batch, sequence = pair.split(",")
        except ValueError:
            raise InputError(
                f"'{key}' is not a state of a statistic; it must read statistic/batch,sequence/field"
            ) from None
        if (batch, sequence) not in pairs.setdefault(statistic, []):
            pairs[statistic].append((batch, sequence))
    return pairs


def check_states(states: States) -> None:
    """Raises InputError unless each statistic has all fields of its aggregation, floats of one shape [rows, 2, ...]."""
    for statistic, pairs in pairs_of(states).items():
        for pair in pairs:
            over_samples, over_sequence = pair
            known = {over_samples} <= {*AGGREGATIONS, TOKENS, ROUTED} and over_sequence in AGGREGATIONS
            names = [f"{statistic}/{','.join(pair)}/{field}" for field in aggregation_of(pair).fields] if known else []
            shapes = {states[name].shape for name in names if name in states and states[name].dtype.kind == "f"}
            complete = names and all(name in states for name in names) and len(shapes) == 1
            if not complete or any(len(shape) < 2 or shape[1] != 2 for shape in shapes):
                raise InputError(f"the statistic '{statistic}/{','.join(pair)}' is incomplete")


def criteria_of(states: States) -> list[str]:
    """The criteria that every statistic over samples can serve."""
    sets = [_names(pairs) for pairs in pairs_of(states).values()]
    kept = sorted((names for names in sets if names), key=len)
    return [name for name in kept[0] if all(name in names for names in kept)] if kept else []


def _names(pairs: list[tuple[str, str]]) -> list[str]:
    """The criteria that one statistic serves; one of routed tokens serves every aggregation over samples."""
    criteria = [(batch, s) for over, s in pairs for batch in (AGGREGATIONS if over == ROUTED else (over,))]
    return [",".join(pair) for pair in criteria if pair[0] != TOKENS]


def state_of(states: States, statistic: str, pair: tuple[str, str], half: int | None = None) -> State:
    """The state, arrays [rows, ...], of both halves together (None) or of one `half`."""
    aggregation = aggregation_of(pair)
    fields = [states[f"{statistic}/{','.join(pair)}/{field}"] for field in aggregation.fields]
    first, second = (tuple(field[:, k] for field in fields) for k in (0, 1))
    return aggregation.merge(first, second) if half is None else (first, second)[half]


def finish(states: States, name: str, half: int | None = None) -> Arrays:
    """Statistic -> its numbers, fp32 [rows, ...], under a criterion. Raises InputError if that was not gathered."""
    wanted, numbers = criterion(name), {}
    for statistic, pairs in pairs_of(states).items():
        over_samples = pairs[0][0]
        pair = {TOKENS: (TOKENS, "mean"), ROUTED: (ROUTED, wanted[1])}.get(over_samples, wanted)
        if pair not in pairs:
            raise InputError(f"'{name}' was not gathered; these scores have {' and '.join(criteria_of(states))}")
        numbers[statistic] = aggregation_of(pair).finish(state_of(states, statistic, pair, half)).astype(np.float32)
    return numbers


def derive(numbers: Arrays, architecture: Architecture, norms: str = "all") -> Arrays:
    """Adds derived scores: ffn and heads from their other statistics, query groups from heads, `hidden` from norms,
    Mamba's heads and their channels from all channels of a layer, the stream from the parts of its logarithm."""
    scores = dict(numbers)
    if "ffn" not in scores and "ffn_pre_activation" in scores:
        scores["ffn"] = scores["ffn_pre_activation"]
    if "heads" not in scores and "head_channels" in scores:
        channels = scores["head_channels"]
        # not head_dim: a head of MLA has another width
        channels = channels.reshape(len(channels), architecture.num_attention_heads, -1)
        scores["heads"] = np.linalg.norm(channels.astype(np.float64), axis=-1).astype(np.float32)
    if "heads" in scores and architecture.grouped_layers:
        grouped = scores["heads"].reshape(len(scores["heads"]), architecture.num_query_groups, -1)
        scores["query_groups"] = grouped.sum(-1, dtype=np.float64).astype(np.float32)
    if "mamba_channels" in scores:  # [layers, heads, channels]; Nemotron-H (2504.11409): L2 over the other dimension
        channels = scores["mamba_channels"].astype(np.float64)
        channels = channels.reshape(len(channels), architecture.mamba_num_heads or 1, -1)
        for name, dim in (("mamba_heads", 2), ("mamba_head_dim", 1)):
            scores[name] = np.linalg.norm(channels, axis=dim).astype(np.float32)
    if "norms" in scores:
        summed = scores["norms"] if norms == "all" else scores["norms"][:-1]
        scores["hidden"] = summed.sum(0, dtype=np.float64).astype(np.float32)
    if "stream_logs" in scores:  # the parts above and below 0
        scores["stream"] = scores["stream_logs"][:, 0] - scores["stream_logs"][:, 1]
    return scores


def experts_by(states: States, name: str, half: int | None = None) -> np.ndarray:
    """The scores of experts, fp32 [num_layers, experts], by another rule than the criterion.

    "reap": the mean, over the tokens that came to an expert, of the router's probability times the L2 norm of the
    expert's output (2510.13999, section 3). The probability is what the model multiplies with: normalized over the
    chosen experts where the model does so, and without a correction bias. "frequency": the share of the routed tokens
    that came to it. Raises InputError for another name, and if no experts were scored.
    """
    if name not in (REAP, FREQUENCY):
        raise InputError(f"experts are not scored by '{name}'; {nearest(name, EXPERTS)}")
    pair = (ROUTED, "mean")
    if f"experts/{','.join(pair)}/count" not in states:
        raise InputError(f"experts by '{name}' need activations of experts, and these scores have none")
    state = state_of(states, "experts", pair, half)
    if name == REAP:
        return aggregation_of(pair).finish(state).astype(np.float32)
    tokens = state[1].sum(-1, keepdims=True)
    return (state[1] / (tokens + (tokens == 0))).astype(np.float32)


def merge(a: States, b: States) -> Arrays:
    """The states of the samples of both runs. Raises InputError if the runs keep different statistics."""
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
