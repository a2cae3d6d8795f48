"""What a job searches for, as plain values: a budget, the shapes to try, how the best ones are ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.schema import setting
from nemo_minitron.settings.validated import ValidatedSettings

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture
    from nemo_minitron.artifacts import Scores
    from nemo_minitron.search.candidates import Measure, SearchResult
    from nemo_minitron.search.sizes import Keep
    from nemo_minitron.search.space import Space
    from nemo_minitron.search.targets import Target

DTYPES = ("bf16", "fp8")
BAND = "Target: %s, at most, e.g. %s. See --tolerance."
TOLERANCE = "Take targets in parameters as bands of this tolerance, e.g. 5%. Default: at most the target."
BOUNDS = "Smallest and largest size of axes, e.g. ffn=512:1536,layers=20:30. Default: half to all of each axis."
DIVISORS = "Divisors of the sizes: 64, fp8 (16 on a rank), fp8=128, tp=8, hidden=128; several are separated by commas."
RANKED = "only a job distils its candidates to rank them"
CUT = "only a job cuts a model to measure it"
SCORES, LOSSES = PROXIES = ("scores", "losses")
Loads = Mapping[str, int | str]  # axis -> what its size must be a multiple of, so that transformers loads it


@dataclasses.dataclass(frozen=True)
class Search(ValidatedSettings):
    """A budget, written as on the command line. Without a target there is no search.

    Targets are upper limits: `params`, `params_no_embeddings` and `active_params` ("84M"), which `tolerance` ("5%")
    turns into bands, as in the papers; `memory` ("8GiB"), of weights and KV cache at `batch` and `context` in the
    dtypes `weights` and `kv_cache`; `flops`, of the forward pass of one token at `context`; `latency` ("30ms"), of a
    forward pass over `batch` sequences of `context` tokens. A latency is measured on this machine for the best shapes
    that meet another target.

    `bounds` ("ffn=512:1536,layers=20:30"), `space` ("layers=29,30;ffn=2.5x,3x") and `divisors` ("64,tp=8", "fp8,tp=4"
    or "fp8=128") say which shapes are tried. `maximal` leaves out a shape that fits inside another one.

    The proxy ranks shapes before any is cut: by the share of `scores` that they keep, or by `losses`: the model is cut
    along one axis at a time, at `marginals` sizes of each, and the measured rises are added.

    The `candidates` that the proxy ranks highest are cut and measured on `tokens` of the held-out corpus. The best
    `distil` of them are distilled by the recipe's own settings for at most `steps` steps, in `rounds` equal parts.
    After each part they are ranked, and the worse half stops (successive halving).

    Raises InputError for a number out of range, and for settings that contradict each other.
    """

    params: str = setting("", BAND % ("parameters", "84M, or 0.7x of the model's"))
    params_no_embeddings: str = setting("", BAND % ("parameters without embeddings", "84M or 8.27B"))
    active_params: str = setting("", BAND % ("parameters active for a token", "84M or 8.27B"))
    memory: str = setting("", "Target: bytes of weights and KV cache, at most, e.g. 8GiB.")
    flops: str = setting("", "Target: FLOPs of the forward pass of a token at --context, at most, e.g. 150M.")
    latency: str = setting(
        "", "Target: time of a forward pass, at most, e.g. 30ms.", recipe_only="only a job measures it"
    )
    batch: int = setting(1, "Sequences in the KV cache, for --memory.")
    context: int = setting(4096, "Tokens of each sequence, for --memory and --flops.")
    weights: str = setting("bf16", "Type of the stored weights, for --memory: bf16 or fp8.", legal=DTYPES)
    kv_cache: str = setting("bf16", "Type of the KV cache, for --memory: bf16 or fp8.", legal=DTYPES)
    tolerance: str = setting("", TOLERANCE)
    bounds: str = setting("", BOUNDS)
    space: str = setting("", "Sizes to try, e.g. 'layers=29,30;ffn=3x' (3x means three times hidden).")
    divisors: str = setting("", DIVISORS)
    maximal: bool = setting(True, "Leave out a shape that fits inside another one.")
    proxy: str = setting(
        SCORES, "What ranks shapes before they are cut: scores that they keep, or losses of cuts along one axis each.",
        legal=PROXIES, recipe_only=CUT,
    )  # fmt: skip
    marginals: int = setting(4, "Sizes of each axis whose loss is measured, with proxy=losses.", recipe_only=CUT)
    candidates: int = setting(12, "Number of candidates to list; a job cuts and measures them.", flag="--top")
    distil: int = setting(4, "Number of candidates that are distilled briefly.", recipe_only=RANKED)
    steps: int = setting(60, "Steps of each brief distillation, at most.", recipe_only=RANKED)
    rounds: int = setting(
        3, "Equal parts of a brief distillation; after each the worse half stops.", recipe_only=RANKED
    )
    tokens: int = setting(8192, "Tokens of the held-out corpus on which a candidate is measured.", recipe_only=RANKED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distil > self.candidates:
            raise InputError(
                f"search.distil is {self.distil}, but search.candidates is {self.candidates}; the nearest legal "
                f"search.distil is {self.candidates}"
            )
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
    def serving(self) -> JsonObject:
        """How a model is served, as `Architecture.memory` takes it."""
        return {name: getattr(self, name) for name in ("batch", "context", "weights", "kv_cache")}

    @property
    def cost(self) -> str:
        """The column of the first target, for the figure."""
        return next(column for name, column in _COLUMNS.items() if getattr(self, name))

    def targets(self) -> list[Target]:
        """The targets of the search. Raises InputError for a text that is no size."""
        from nemo_minitron.search import parse, targets

        share = parse.tolerance(self.tolerance) if self.tolerance else None
        wanted = []
        for name, options in _BANDS.items():
            if text := getattr(self, name):
                wanted.append(targets.parameters(parse.count(text, _option(name)), share, **options))
        if self.memory:
            wanted.append(targets.memory(parse.size_in_bytes(self.memory, "--memory"), **self.serving))
        if self.flops:
            wanted.append(targets.flops(parse.count(self.flops, "--flops"), context=self.context))
        return wanted

    def for_model(self, source: Architecture) -> Search:
        """The same search with a share, `0.7x`, as parameters of the model. Raises InputError for a share of 1 or
        more."""
        from nemo_minitron.search import parse

        return dataclasses.replace(self, params=parse.share(self.params, source.parameters(), "--params"))

    def shapes(self, source: Architecture, keep: Keep, loads: Loads | None = None) -> Space:
        """The space of shapes to try. `keep` fixes axes; `loads` and refusals are as in `make_space`."""
        from nemo_minitron.search import make_space, parse

        return make_space(
            source, lists=parse.lists(self.space), bounds=parse.bounds(self.bounds),
            divisors=parse.divisors(self.divisors), keep=keep, loads=loads,
        )  # fmt: skip

    def run(
        self, source: Architecture, keep: Keep, scores: Scores | None = None,
        measure: Measure | None = None, loads: Loads | None = None, **options: Any,
    ) -> SearchResult:  # fmt: skip
        """The candidates. `measure` gives a candidate's latency in seconds; None leaves the latency out. `loads` goes
        to `make_space`, `options` to `search.search`. Raises InputError if nothing meets the targets."""
        from nemo_minitron.search import parse, search

        settings = {"top": self.candidates, "maximal": self.maximal} | options
        if self.latency and measure:
            settings["latency"] = (parse.seconds(self.latency, "--latency"), measure)
        return search(self.shapes(source, keep, loads), self.targets(), scores, **settings)

    def describe(self, source: Architecture, keep: Keep, loads: Loads | None = None) -> str:
        """What is searched and how, in one line."""
        result = self.run(source, keep, loads=loads)
        latency = [f"a latency of at most {self.latency}, yet to be measured"] if self.latency else []
        wanted, count = " and ".join([*map(str, self.targets()), *latency]), len(result.candidates)
        single = (
            f"each axis is cut alone and measured at up to {self.marginals} sizes; " if self.proxy == LOSSES else ""
        )
        return (
            f"{result.combinations:,} shapes, {result.fitting:,} with {wanted}; {single}{count} are cut and measured, "
            f"{min(self.distil, count)} distilled for {self.steps} steps in {self.rounds} rounds"
        )

    def remark(self, source: Architecture) -> str:
        """What to know of a latency of this model; empty if there is nothing."""
        if not (self.latency and source.hybrid_pattern):
            return ""
        return (
            "search.latency times a hybrid's Mamba layers in PyTorch code if transformers does not find their kernels "
            "(mamba-ssm, causal-conv1d) or there is no GPU; such a time compares shapes, and is longer than an engine's"
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
