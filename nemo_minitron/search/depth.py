"""Chooses the layers to drop by a criterion of depth other than block influence."""

from __future__ import annotations

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE, NOTHING, REMOVAL, Block, size_of
from nemo_minitron.errors import InputError, nearest

HIGHER_IS_BETTER = ("accuracy",)  # of the remaining model; any other criterion is better where it is lower


def layers_to_drop(
    scores: Scores, count: int, criterion: str, *, contiguous: bool = True, least: bool = False
) -> list[int]:
    """The `count` source layers, sorted, that matter least by `scores.depth[criterion]`.

    They are the best contiguous block of exactly that size (2408.11796, section 4.1) or, with `contiguous=False`, the
    best single layers, each scored alone. For `removal` they are the layers that were removed first. Of equal blocks or
    layers the later one is dropped. `least=True` drops the layers that matter most instead.

    Raises InputError, which lists what was scanned, for a criterion or a size that was not.
    """
    if criterion not in scores.depth:
        legal = nearest(criterion, [BLOCK_INFLUENCE, *scores.depth])
        raise InputError(f"these scores have no depth criterion '{criterion}'; {legal}")
    values = scores.depth[criterion]
    if criterion == REMOVAL:
        return _removed(list(values), count, least)
    sign = -1 if (criterion in HIGHER_IS_BETTER) != least else 1
    size = count if contiguous else 1
    blocks = {block: sign * value for block, value in values.items() if size_of(block) == size}
    if len(blocks) < scores.architecture.num_layers - size + 1:
        raise InputError(_not_scanned(criterion, values, size, contiguous))
    ranked = sorted(blocks, key=lambda block: (blocks[block], -block[0]))
    return sorted(layer for first, last in ranked[: 1 if contiguous else count] for layer in range(first, last + 1))


def _removed(order: list[Block], count: int, least: bool) -> list[int]:
    if least:
        raise InputError("removal knows only which layers matter least; for the most important ones scan the loss")
    if count > len(order):
        raise InputError(
            f"removal stopped after {len(order)} layers, {count} are to be dropped; the nearest legal number is "
            f"{len(order)}"
        )
    return sorted(first for first, _ in order[:count])


def _not_scanned(criterion: str, values: dict[Block, float], size: int, contiguous: bool) -> str:
    sizes = sorted({size_of(block) for block in values} - {size_of(NOTHING)})
    if not sizes:
        return f"'{criterion}' was scanned for no block; scan blocks of {size} layers"
    said = " and ".join([", ".join(map(str, sizes[:-1])), str(sizes[-1])] if len(sizes) > 1 else [str(sizes[0])])
    text = f"'{criterion}' was scanned for blocks of {said} layers, not for all of {size}; "
    if contiguous and 1 in sizes:
        return text + f"scan sizes={size}, or drop single layers with contiguous=False"
    return text + f"scan sizes={size}; the nearest size scanned is {min(sizes, key=lambda n: abs(n - size))}"
