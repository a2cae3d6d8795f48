"""What a calibration reads and gathers: rows of tokens, statistics of the width axes, criteria of depth."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE, REMOVAL
from nemo_minitron.artifacts.statistics import criterion
from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.schema import MODEL, OUTPUT, seed_setting, setting
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.validated import ValidatedSettings, precision_setting

SCANS = ("loss", "perplexity", "accuracy")  # measured on the model without each block of layers
DEPTH = (*SCANS, REMOVAL)
DERIVED = {  # axis -> the axis whose statistics give its scores
    "hidden": "norms", "query_groups": "heads", "mamba_heads": "mamba_channels", "mamba_head_dim": "mamba_channels",
    "stream": "stream_logs",
}  # fmt: skip
STATISTICS, SCANNED = "statistics.safetensors", "depth.safetensors"  # files that an interrupted run resumes from
TAYLOR = "taylor"
RUNNING = ("activation", TAYLOR)  # methods that run the model; the others read its weights, or nothing at all
METHODS = (*RUNNING, "magnitude", "random")
NORMS = ("all", "layers")
BY_CRITERION = "criterion"
EXPERTS = (BY_CRITERION, "reap", "frequency")
CRITERION = "Aggregations over batch,sequence: mean, l2, var, max. Repeat the option for several criteria."
METHOD_HELP = "What units are scored by: activation, taylor (activation x gradient), magnitude (of weights), random."
EXPERTS_HELP = "What scores experts: criterion, reap (gate x norm of the output), frequency (of routing)."
READ = ("sequence_length", "batch_size", "precision", "seed")
WIDTH = (*READ, "samples", "method", "criterion", "norms", "axes", "save_every")
ROWS = (*READ, "depth_samples")
# What is gathered -> the settings that decide it. A change of any other setting keeps the file, so that a run resumes.
DECIDE = {
    STATISTICS: WIDTH, "loss": (*ROWS, "depth_sizes"), "perplexity": (*ROWS, "depth_sizes"), REMOVAL: (*ROWS, "remove"),
    "accuracy": ("batch_size", "precision", "depth_sizes"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Calibration(ValidatedSettings):
    """One forward pass over `samples` rows of `sequence_length` tokens, in micro-batches of `batch_size` rows.

    A row is a window of the corpus. The corpus is packed: its documents follow each other, each with an EOS token at
    its end. Windows do not overlap. `seed` shuffles them, and the first `samples` of that order are read, the same in
    every layout.

    `criterion`: aggregations over batch,sequence, several separated by semicolons; the first one is shown. `axes`: the
    axes to score; all axes of the model if it is empty. After every `save_every` rows the state is saved, and an
    interrupted run resumes from there. `depth`: criteria beside block influence, on `depth_samples` rows of the same
    corpus and seed: loss, perplexity and accuracy (on the questions in the JSONL file `items`) without each block of
    `depth_sizes` layers, and the removal of `remove` layers one by one. `method`: what scores the width axes. It is
    activation; taylor (activation times gradient), magnitude (of weights) and random are there for comparison.
    `experts`: what scores experts in place of the criterion (`artifacts.criteria.experts_by`); it gathers nothing more.

    Raises InputError for a number out of range and an unknown name.
    """

    samples: int = setting(
        1024, "Number of rows that are read, each of --sequence-length tokens.", derived=True, panel=MODEL
    )
    sequence_length: int = setting(4096, "Length of a row, in tokens.", derived=True, panel=MODEL)
    batch_size: int = setting(1, "Rows of a micro-batch, on each rank.")
    criterion: str = setting("l2,mean", CRITERION, repeated=";")
    norms: str = setting(
        "all", "Norms whose scores are summed for hidden: all, or layers (all but the final norm).", legal=NORMS
    )
    precision: str = precision_setting("fp32")
    seed: int = seed_setting(help="The seed of the order in which rows are drawn.", panel=MODEL)
    axes: tuple[str, ...] = setting(
        (), "Axes to score, separated by commas: ffn, heads, hidden, layers, ... Default: all axes."
    )
    save_every: int = setting(64, "Rows between two saves, from which an interrupted run resumes.", panel=OUTPUT)
    depth: tuple[str, ...] = setting(
        (), "Depth criteria beside block influence, separated by commas: " + ", ".join(DEPTH) + "."
    )
    depth_sizes: tuple[int, ...] = setting(
        (1,), "Sizes in layers of the contiguous blocks that --depth leaves out, separated by commas."
    )
    depth_samples: int = setting(16, "Rows on which --depth loss, perplexity and removal are measured.", derived=True)
    items: str = setting(
        "", "JSONL file of questions for --depth accuracy; each row has context, choices and answer.", panel=MODEL
    )
    remove: int = setting(0, "Number of layers that --depth removal removes, one by one.", least=0)
    method: str = setting("activation", METHOD_HELP, legal=METHODS)
    experts: str = setting(BY_CRITERION, EXPERTS_HELP, legal=EXPERTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.criteria:
            criterion(name)
        for name in self.depth:
            if name not in DEPTH:
                raise InputError(f"depth criterion '{name}' is unknown; {nearest(name, DEPTH)}")
        for size in self.depth_sizes:
            if size < 1:
                raise InputError(f"depth_sizes names blocks of {size} layers; the nearest legal size is 1")

    @property
    def criteria(self) -> list[str]:
        """The criteria of `criterion`, one by one."""
        return [name.strip() for name in self.criterion.split(";")]

    @property
    def statistics(self) -> list[str] | None:
        """The axes whose statistics give the scores of `axes`; None for all."""
        return [DERIVED.get(name, name) for name in self.axes] or None

    @property
    def runs(self) -> bool:
        """Whether the model runs to score the width axes."""
        return self.method in RUNNING

    @property
    def scores_stream(self) -> bool:
        """Whether the length of the residual stream is among what is scored."""
        return self.method == RUNNING[0] and (not self.axes or not {"stream", "stream_logs"}.isdisjoint(self.axes))

    @property
    def counts_experts(self) -> bool:
        """Whether it is among what is scored how often each expert of a mixture is chosen."""
        return self.method == RUNNING[0] and (not self.axes or "experts" in self.axes)

    def check(self, architecture: Architecture, layout: Layout) -> None:
        """Raises InputError for an axis that the model lacks, blocks that leave no layer, questions that cannot be
        read, and a setting that would have no effect."""
        legal = axes_of(architecture)
        for axis in self.axes:
            if axis not in legal:
                raise InputError(f"the model has no scores of '{axis}'; {nearest(axis, legal)}")
        if self.depth and architecture.hybrid_pattern:
            raise InputError(
                f"depth by {self.depth[0]} is not computed for a hybrid with Mamba; its layers have block influence, "
                f"so leave depth out"
            )
        for name, option, given in (("accuracy", "items", bool(self.items)), (REMOVAL, "remove", self.remove > 0)):
            if (name in self.depth) != given:
                have, lack = (option, f"depth criterion '{name}'") if given else (f"depth '{name}'", f"'{option}'")
                raise InputError(f"{have} needs {lack}; set both or neither")
        if self.experts != BY_CRITERION and not (self.counts_experts and "experts" in legal):
            raise InputError(
                f"experts by {self.experts} need a mixture's activations: method 'activation', and the axis 'experts' "
                f"among those that are scored; the nearest legal value is '{BY_CRITERION}'"
            )
        if self.method == TAYLOR and layout.vp > 1:
            raise InputError(f"Taylor scores need one stage a rank, not vp={layout.vp}; the nearest legal vp is 1")
        most = architecture.num_layers - 1
        for option, value in (("depth_sizes", max(self.depth_sizes, default=1)), ("remove", self.remove)):
            if self.depth and value > most:
                raise InputError(
                    f"{option} {value} is not legal in a model of {most + 1} layers; legal are 1 to {most}, the "
                    f"nearest is {most}"
                )
        if self.items:
            from nemo_minitron.importance.depth.items import read_items

            read_items(Path(self.items))

    def describe(self) -> str:
        """What is read and gathered, in one line."""
        text = f"{self.samples} rows of {self.sequence_length} tokens, {', '.join(self.axes) or 'all axes'} by "
        text += "; ".join(self.criteria) + (f" of {self.method}" if self.method != "activation" else "")
        text += f", experts by {self.experts}" if self.experts != BY_CRITERION else ""
        sizes = ", ".join(map(str, self.depth_sizes))
        scans = [f"{name} without blocks of {sizes} layers" for name in self.depth if name in SCANS]
        scans += [f"removal of {self.remove} layers"] if REMOVAL in self.depth else []
        return text + (f"; {' and '.join(scans)}, on {self.depth_samples} rows" if scans else "")

    def marks(self, *identity: str) -> dict[str, str]:
        """What is gathered -> the digest of what decides it: its settings and `identity` (of model, data, layout)."""
        from nemo_minitron.artifacts.files import digest_of, file_digest

        digests = {}
        for name in (STATISTICS, *self.depth):
            settings = [getattr(self, setting) for setting in DECIDE[name]]
            extra = [file_digest(self.items)] if name == "accuracy" else []
            digests[name] = digest_of([name, settings, *extra, *identity])
        return digests

    def for_plan(self, depth: str, dropped: int) -> Calibration:
        """This calibration, extended by what a plan needs that drops `dropped` layers by the criterion `depth`.

        Raises InputError for an unknown criterion, for a criterion if no layers are dropped, and as `Calibration` does.
        """
        if depth == BLOCK_INFLUENCE:
            return self
        if depth not in DEPTH:
            raise InputError(f"depth '{depth}' is unknown; {nearest(depth, (BLOCK_INFLUENCE, *DEPTH))}")
        if not dropped:
            raise InputError(
                f"depth '{depth}' chooses layers, but the recipe drops none; set keep.layers, or leave out depth"
            )
        names = tuple(dict.fromkeys([*self.depth, depth]))
        if depth == REMOVAL:
            return dataclasses.replace(self, depth=names, remove=max(self.remove, dropped))
        return dataclasses.replace(self, depth=names, depth_sizes=tuple(sorted({*self.depth_sizes, dropped})))


def axes_of(architecture: Architecture) -> list[str]:
    """The axes that the built-in estimators score in a model of one of the families."""
    mamba = ["mamba_channels", "mamba_heads", "mamba_head_dim"] if architecture.mamba_layers else []
    axes = ["norms", "layers", "hidden", "stream", "stream_logs", *mamba]
    axes += ["heads", "head_channels"] if architecture.attention_layers else []
    axes += ["query_groups"] if architecture.grouped_layers else []
    axes += [name for name in ("q_latent", "kv_latent") if AXES[name].length(architecture)]
    axes += ["ffn", "ffn_pre_activation"] if architecture.dense_layers else []
    axes += ["q_norm", "k_norm"] if architecture.qk_norm else []
    axes += ["experts", "expert_ffn"] if architecture.moe_layers else []
    return axes + (["shared_expert_ffn"] if architecture.moe_shared_expert_intermediate_size else [])
