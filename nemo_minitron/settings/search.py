"""What a job's search is after, as plain values: a budget, the shapes to try, how the best few are ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import InputError
from nemo_minitron.schema import setting
from nemo_minitron.settings.validated import ValidatedSettings

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture
    from nemo_minitron.artifacts import Scores
    from nemo_minitron.search.candidates import Measure, SearchResult
    from nemo_minitron.search.space import Space
    from nemo_minitron.search.targets import Target

DTYPES = ("bf16", "fp8")
BAND = "%s within --tolerance, e.g. 84M or 8.27B."
BOUNDS = "Least and largest size of an axis, e.g. ffn=512:1536 (several with commas); half to all unless given."
DIVISORS = "What sizes must be multiples of: 64, fp8 (16 on a rank), fp8=128, tp=8, hidden=128, or several with commas."
RANKED = "a job ranks its candidates by distilling them"
Loads = Mapping[str, int | str]  # a family's `multiples`


@dataclasses.dataclass(frozen=True)
class Search(ValidatedSettings):
    """A budget, written as on the command line; without a target there is no search.

    `params`, `params_no_embeddings`, `active_params` ("84M"): bands of `tolerance`; `memory` ("8GiB") of weights
    and KV cache at `batch` and `context`, in the dtypes `weights` and `kv_cache`, and `flops` of a token at
    `context`: at most; so is `latency` ("30ms") of a forward pass over `batch` sequences of `context` tokens, which
    is measured on this machine for the best shapes that meet another target. `bounds` ("ffn=512:1536,layers=20:30"),
    `space` ("layers=29,30;ffn=2.5x,3x") and `divisors` ("64,tp=8", "fp8,tp=4" or "fp8=128") say which shapes are tried;
    `maximal` leaves out those that fit inside another.

    The best `candidates` by the proxy are cut and measured on `tokens` of the held-out corpus; the best `distil` of
    those are distilled, with the recipe's own settings, for `steps` steps at most and ranked after each of `rounds`
    equal parts; after each the worse half stops (successive halving).
    """

    params: str = setting("", BAND % "Parameters")
    params_no_embeddings: str = setting("", BAND % "Parameters without embeddings")
    active_params: str = setting("", BAND % "Parameters active for a token")
    memory: str = setting("", "At most, weights and KV cache, e.g. 8GiB.")
    flops: str = setting("", "At most, forward, of a token at --context, e.g. 150M.")
    latency: str = setting("", "At most, of a forward pass, e.g. 30ms.", recipe_only="a job measures it")
    batch: int = setting(1, "Sequences in the KV cache.")
    context: int = setting(4096, "Tokens of each.")
    weights: str = setting("bf16", "What weights are stored in: bf16 or fp8.", legal=DTYPES)
    kv_cache: str = setting("bf16", "What the KV cache is stored in: bf16 or fp8.", legal=DTYPES)
    tolerance: str = setting("5%", "Of the targets in parameters.")
    bounds: str = setting("", BOUNDS)
    space: str = setting("", "Sizes to try, e.g. 'layers=29,30;ffn=3x' (3x: of hidden).")
    divisors: str = setting("", DIVISORS)
    maximal: bool = setting(True, "Leave out shapes that fit inside another.")
    candidates: int = setting(12, "Candidates to list; a job cuts and measures them.", flag="--top")
    distil: int = setting(4, "Of them distilled briefly.", recipe_only=RANKED)
    steps: int = setting(60, "Steps of each brief distillation, at most.", recipe_only=RANKED)
    rounds: int = setting(3, "Equal parts of it; after each the worse half stops.", recipe_only=RANKED)
    tokens: int = setting(8192, "Of the held-out corpus, to measure a candidate.", recipe_only=RANKED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distil > self.candidates:
            raise InputError(f"search.distil is {self.distil} of {self.candidates} candidates; give at most as many")
        if self.latency and not self.wanted:
            raise InputError("search.latency needs another target, which says what is measured; set search.params")
        if self.steps % self.rounds:
            near = max(1, round(self.steps / self.rounds)) * self.rounds
            raise InputError(
                f"search.steps {self.steps} do not divide into {self.rounds} rounds; the nearest legal number is {near}"
            )

    @property
    def wanted(self) -> bool:
        """Whether there is a target."""
        return bool(self.params or self.params_no_embeddings or self.active_params or self.memory or self.flops)

    @property
    def serving(self) -> dict[str, Any]:
        """How a model is served, as `Architecture.memory` takes it."""
        return {name: getattr(self, name) for name in ("batch", "context", "weights", "kv_cache")}

    @property
    def cost(self) -> str:
        """The column that the first target is about, for the figure."""
        return next(column for name, column in _COLUMNS.items() if getattr(self, name))

    def targets(self) -> list[Target]:
        """Raises InputError for what is no size."""
        from nemo_minitron.search import parse, targets

        share = parse.tolerance(self.tolerance)
        found = []
        for name, options in _BANDS.items():
            if text := getattr(self, name):
                found.append(targets.parameters(parse.count(text, _option(name)), share, **options))
        if self.memory:
            found.append(targets.memory(parse.size_in_bytes(self.memory, "--memory"), **self.serving))
        if self.flops:
            found.append(targets.flops(parse.count(self.flops, "--flops"), context=self.context))
        return found

    def shapes(self, source: Architecture, keep: Mapping[str, Any], loads: Loads | None = None) -> Space:
        """The space; `keep` fixes axes, `loads` as for `make_space`. Raises InputError as that does."""
        from nemo_minitron.search import make_space, parse

        return make_space(
            source, lists=parse.lists(self.space), bounds=parse.bounds(self.bounds),
            divisors=parse.divisors(self.divisors), keep=keep, loads=loads,
        )  # fmt: skip

    def run(
        self, source: Architecture, keep: Mapping[str, Any], scores: Scores | None = None,
        measure: Measure | None = None, loads: Loads | None = None, **options: Any,
    ) -> SearchResult:  # fmt: skip
        """The candidates. `measure` gives a candidate's latency in seconds (None: it is not looked at), `loads` is for
        `make_space`, `options` for `search.search`. Raises InputError where nothing meets the targets."""
        from nemo_minitron.search import parse, search

        settings = {"top": self.candidates, "maximal": self.maximal} | options
        if self.latency and measure:
            settings["latency"] = (parse.seconds(self.latency, "--latency"), measure)
        return search(self.shapes(source, keep, loads), self.targets(), scores, **settings)

    def words(self, source: Architecture, keep: Mapping[str, Any], loads: Loads | None = None) -> str:
        """What is searched and how, in a line."""
        found = self.run(source, keep, loads=loads)
        late = [f"a latency of at most {self.latency}, yet to be measured"] if self.latency else []
        asked, count = " and ".join([*map(str, self.targets()), *late]), len(found.candidates)
        return (
            f"{found.combinations:,} shapes, {found.fitting:,} with {asked}; {count} are cut and measured, "
            f"{min(self.distil, count)} distilled for {self.steps} steps in {self.rounds} rounds"
        )


_COLUMNS = {
    "params": "parameters", "params_no_embeddings": "without_embeddings", "active_params": "active_parameters",
    "memory": "bytes", "flops": "flops",
}  # fmt: skip
_BANDS: dict[str, dict[str, bool]] = {
    "params": {},
    "params_no_embeddings": {"embeddings": False},
    "active_params": {"active": True},
}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
