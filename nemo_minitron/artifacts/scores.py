"""Scores: the importance of each unit of a model, in global order, independent of the layout that made them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import criteria
from nemo_minitron.artifacts.files import atomic_file, digest_of, parse_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.parse import anything, checked, grouped, listed, mapped, maybe, number, text, whole
from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError, nearest

VERSION = 1
ACTIVATION = "activation"
HEADER = grouped(
    {"architecture": mapped(anything(2)), "criterion": text(), "norms": text(), "samples": whole(), "tokens": whole(),
     "model_digest": maybe(text()), "data_digest": maybe(text()), "layout": mapped(anything(4)),
     "notes": mapped(anything()), "depth": mapped(listed(listed(number(), least=3, most=3)))},
    {"method": text()},
)  # fmt: skip  # of a file


@dataclasses.dataclass
class Scores:
    """Importance, fp32, global order; a larger number matters more.

    `s["ffn"]` [num_layers, ffn]; `s["heads"]` [num_layers, heads]; `s["query_groups"]` [num_layers, groups];
    `s["norms"]` [norms, hidden] (input and pre-MLP norm of each layer, then the final one); `s["hidden"]`
    [hidden]; `s["layers"]` [num_layers] (block influence); for a mixture of experts `s["experts"]` [num_layers,
    experts], `s["expert_ffn"]` [num_layers, experts, ffn] and `s["shared_expert_ffn"]` [num_layers, ffn]. Only
    the requested scores are present; a layer without the module has zeros. `s["stream"]` [num_layers + 1] is no
    importance: the mean logarithm of the residual stream's norm, in front of each layer and behind the last.
    `states` are the mergeable statistics behind the scores: `under` computes the scores of another criterion from them,
    and `merge` those of two runs together. `method` says what was scored: activations, `taylor`, `magnitude` or
    `random`. `samples`, `tokens`, `layout` and `notes` record how the scores were made and are not part of their
    identity.
    """

    architecture: Architecture
    tensors: dict[str, np.ndarray]
    criterion: str = "l2,mean"
    norms: str = "all"
    samples: int = 0
    tokens: int = 0
    model_digest: str | None = None
    data_digest: str | None = None
    layout: JsonObject = dataclasses.field(default_factory=dict)
    depth: dict[str, dict[tuple[int, int], float]] = dataclasses.field(default_factory=dict)
    states: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    notes: JsonObject = dataclasses.field(default_factory=dict)
    method: str = ACTIVATION

    def __getitem__(self, name: str) -> np.ndarray:
        """Raises InputError, which lists the axes that were scored, for an axis that was not."""
        if name not in self.tensors:
            raise InputError(f"these scores have no '{name}'; {nearest(name, self.tensors)}")
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def criteria(self) -> list[str]:
        """The criteria under which `under` can give these scores."""
        return criteria.criteria_of(self.states)

    def under(self, criterion: str, norms: str | None = None) -> Scores:
        """The scores of the same pass under another criterion and sum of norms. Raises InputError if it was not
        gathered."""
        norms = norms or self.norms
        criteria.check_norms(norms)
        if not self.states:
            raise InputError(f"these scores keep no statistics; their only criterion is '{self.criterion}'")
        numbers = criteria.derive(criteria.finish(self.states, criterion), self.architecture, norms)
        made = dataclasses.replace(
            self, tensors={**self._without_states(), **numbers}, criterion=criterion, norms=norms
        )
        return made.by_experts(self.notes["experts"]) if "experts" in self.notes else made

    def by_experts(self, name: str) -> Scores:
        """The same scores with experts scored by "reap" or "frequency" (`criteria.experts_by`); the notes keep it."""
        experts = criteria.experts_by(self.states, name)
        return dataclasses.replace(
            self, tensors=self.tensors | {"experts": experts}, notes=self.notes | {"experts": name}
        )

    def merge(self, other: Scores) -> Scores:
        """The scores of the samples of both runs together; both must have scored the same model by the same statistics.

        Raises InputError if the models or the statistics differ.
        """
        if self.architecture != other.architecture or self.model_digest != other.model_digest:
            raise InputError(f"the two runs scored different models ({self.model_digest} and {other.model_digest})")
        if self.method != other.method or not self.states:
            raise InputError(
                f"scores by '{self.method}' and by '{other.method}' do not merge; legal are two runs of one method, "
                f"with their statistics"
            )
        digests = [self.data_digest, other.data_digest]
        merged = dataclasses.replace(
            self, states=criteria.merge(self.states, other.states), samples=self.samples + other.samples,
            tokens=self.tokens + other.tokens, data_digest=digests[0] if len(set(digests)) == 1 else digest_of(digests),
        )  # fmt: skip
        return merged.under(self.criterion)

    def _without_states(self) -> dict[str, np.ndarray]:
        """The scores without a statistic behind them: they do not depend on the criterion."""
        known = criteria.pairs_of(self.states)
        derived = criteria.derive(
            {name: self.tensors[name] for name in known if name in self.tensors}, self.architecture
        )
        return {name: array for name, array in self.tensors.items() if name not in derived}

    @property
    def digest(self) -> str:
        """sha256 of the numbers and of the model they belong to, in hex; independent of the layout that made them."""
        import hashlib

        numbers = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in self.tensors.items()}
        about = [self.architecture.as_dict(), self.criterion, self.norms, self.model_digest, numbers]
        return digest_of(about if self.method == ACTIVATION else [*about, self.method])

    def save(self, path: str | Path) -> None:
        """Raises InputError for a number that is not finite."""
        from safetensors.numpy import save_file

        self._check_finite(path)

        header = {
            "version": VERSION,
            "architecture": self.architecture.as_dict(),
            **{name: getattr(self, name) for name in (*_PLAIN, "method")},
            "depth": {c: [[*block, value] for block, value in d.items()] for c, d in self.depth.items()},
        }
        arrays = {f"scores/{name}": np.ascontiguousarray(a, np.float32) for name, a in self.tensors.items()}
        arrays |= {f"states/{name}": np.ascontiguousarray(a) for name, a in self.states.items()}
        with atomic_file(path) as temporary:
            save_file(arrays, str(temporary), metadata={"scores": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads scores. Raises InputError if the file is missing, is not a safetensors file or holds no scores."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise InputError(f"the scores '{path}' do not exist")
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = parse_json((file.metadata() or {})["scores"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = checked(header, HEADER, f"the header of the scores '{path}'")
            plain = {name: header[name] for name in _PLAIN}
            plain["method"] = header.get("method", ACTIVATION)  # older files lack it
            depth = {c: {(int(a), int(b)): v for a, b, v in rows} for c, rows in header["depth"].items()}
            architecture = Architecture.from_dict(header["architecture"])
            criteria.check_norms(plain["norms"])
        except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"'{path}' is no file of scores ({type(error).__name__}: {error})") from None
        scores = cls(architecture, _under("scores/", arrays), depth=depth, states=_under("states/", arrays), **plain)
        scores.check(path)
        return scores

    def check(self, path: str | Path = "scores") -> None:
        """Raises InputError if the shape of a tensor does not fit the architecture, or a number is not finite."""
        for name, shape in expected_shapes(self.architecture).items():
            if name in self.tensors and self.tensors[name].shape != shape:
                raise InputError(f"'{path}': '{name}' is {self.tensors[name].shape}, the architecture says {shape}")
        self._check_finite(path)

    def _check_finite(self, path: str | Path) -> None:
        """Checks the scores, the statistics behind them and the scores of depth."""
        for name, array in [*self.tensors.items(), *self.states.items()]:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InputError(f"'{path}': '{name}' holds a number that is not finite")
        for criterion, blocks in self.depth.items():
            for (first, last), value in blocks.items():
                if not math.isfinite(value):
                    raise InputError(f"'{path}': {criterion} of block {first} to {last} is {value}, no finite number")
        try:
            criteria.check_states(self.states)
        except InputError as error:
            raise InputError(f"'{path}': {error}") from None


_PLAIN = ("criterion", "norms", "samples", "tokens", "model_digest", "data_digest", "layout", "notes")


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The global shape of each tensor of scores; those of experts and Mamba only where there are any."""
    a, layers = architecture, architecture.num_layers
    shapes: dict[str, tuple[int, ...]] = {
        "ffn": (layers, a.ffn_hidden_size),
        "heads": (layers, a.num_attention_heads),
        "hidden": (a.hidden_size,),
        "norms": (2 * layers + 1, a.hidden_size),
        "layers": (layers,),
        "stream": (layers + 1,),
        "stream_logs": (layers + 1, 2),
    }
    for name in ("query_groups", "q_latent", "kv_latent"):
        if length := AXES[name].length(a):
            shapes[name] = (layers, length)
    if a.hybrid_pattern:
        shapes["mamba_heads"] = (layers, a.mamba_num_heads or 0)
        shapes["mamba_head_dim"] = (layers, a.mamba_head_dim or 0)
    if a.num_moe_experts:
        shapes["experts"] = (layers, a.num_moe_experts)
        shapes["expert_ffn"] = (layers, a.num_moe_experts, a.moe_ffn_hidden_size or 0)
    if a.moe_shared_expert_intermediate_size:
        shapes["shared_expert_ffn"] = (layers, a.moe_shared_expert_intermediate_size)
    return shapes
