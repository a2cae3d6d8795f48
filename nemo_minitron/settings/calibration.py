"""What a calibration reads and gathers: rows of tokens, statistics of the width axes, criteria of depth."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE, REMOVAL
from nemo_minitron.artifacts.statistics import criterion
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.schema import MODEL, OUTPUT, seed_setting, setting
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.validated import ValidatedSettings, precision_setting

SCANS = ("loss", "perplexity", "accuracy")  # of the model without each block of layers
DEPTH = (*SCANS, REMOVAL)
DERIVED = {"hidden": "norms", "query_groups": "heads"}  # scores of one axis that another's statistics give
STATISTICS, SCANNED = "statistics.safetensors", "depth.safetensors"  # what a calibration keeps, to go on from
TAYLOR = "taylor"
RUNNING = ("activation", TAYLOR)  # methods that run the model; the others read its weights or nothing
METHODS = (*RUNNING, "magnitude", "random")
NORMS = ("all", "layers")
CRITERION = "batch,sequence: mean, l2, var or max; several with a semicolon between them, or the option repeated."
METHOD_HELP = "What scores units: activation, taylor (times gradients), magnitude (of weights) or random."
READ = ("sequence_length", "batch_size", "precision", "seed")
WIDTH = (*READ, "samples", "method", "criterion", "norms", "axes", "save_every")
ROWS = (*READ, "depth_samples")
DECIDE = {
    STATISTICS: WIDTH, "loss": (*ROWS, "depth_sizes"), "perplexity": (*ROWS, "depth_sizes"), REMOVAL: (*ROWS, "remove"),
    "accuracy": ("batch_size", "precision", "depth_sizes"),
}  # fmt: skip  # which settings decide what


@dataclasses.dataclass(frozen=True)
class Calibration(ValidatedSettings):
    """One forward pass over `samples` rows of `sequence_length` tokens, `batch_size` rows a micro-batch.

    A row is a window of the corpus, whose documents stand end to end, each closed by its EOS (packing); windows do
    not overlap, and `seed` says in which order they come: the first `samples` of it, in every layout.
    `criterion`: batch,sequence aggregations, several with a semicolon between them; the first is shown. `axes`:
    all that the model has, unless given; `save_every` rows what was gathered is saved, and a killed run goes on
    from there. `depth`: criteria beside block influence, over `depth_samples` rows of the same corpus and seed:
    loss, perplexity and accuracy (of the questions in the JSONL file `items`) without each block of `depth_sizes`
    layers, and removal of `remove` layers one by one. `method`: what the width axes are scored by, to compare:
    activation, taylor (activation times gradient), magnitude (of weights) or random. Raises InputError for what
    is unknown.
    """

    samples: int = setting(1024, "Rows of the corpus.", derived=True, panel=MODEL)
    sequence_length: int = setting(4096, "Tokens of a sample.", derived=True, panel=MODEL)
    batch_size: int = setting(1, "Rows of a micro-batch.")
    criterion: str = setting("l2,mean", CRITERION, repeated=";")
    norms: str = setting("all", "Which norms `hidden` sums: all, or layers, without the final one.", legal=NORMS)
    precision: str = precision_setting("fp32")
    seed: int = seed_setting(help="Which rows are drawn, and in which order.", panel=MODEL)
    axes: tuple[str, ...] = setting((), "Axes with commas: ffn, heads, hidden, layers ...; all unless given.")
    save_every: int = setting(64, "Rows between saves, for a run that is killed.", panel=OUTPUT)
    depth: tuple[str, ...] = setting((), "Criteria beside block influence, with commas: " + ", ".join(DEPTH) + ".")
    depth_sizes: tuple[int, ...] = setting((1,), "Sizes of the contiguous blocks that are left out, with commas.")
    depth_samples: int = setting(16, "Rows for the loss, the perplexity and the removal of layers.", derived=True)
    items: str = setting("", "JSONL of context, choices and answer, for --depth accuracy.", panel=MODEL)
    remove: int = setting(0, "How many layers --depth removal takes, one by one.", least=0)
    method: str = setting("activation", METHOD_HELP, legal=METHODS)

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
        return [name.strip() for name in self.criterion.split(";")]

    @property
    def statistics(self) -> list[str] | None:
        """The axes whose statistics are gathered for the axes asked for; None for all."""
        return [DERIVED.get(name, name) for name in self.axes] or None

    @property
    def runs(self) -> bool:
        """Whether the model runs for the width axes."""
        return self.method in RUNNING

    def check(self, architecture: Architecture, layout: Layout) -> None:
        """Raises InputError for axes that the model lacks, blocks that leave no layer, questions that cannot be read,
        and what would be unused."""
        legal = axes_of(architecture)
        for axis in self.axes:
            if axis not in legal:
                raise InputError(f"the model has no scores of '{axis}'; {nearest(axis, legal)}")
        for name, option, given in (("accuracy", "items", bool(self.items)), (REMOVAL, "remove", self.remove > 0)):
            if (name in self.depth) != given:
                have, lack = (option, f"depth criterion '{name}'") if given else (f"depth '{name}'", f"'{option}'")
                raise InputError(f"{have} needs {lack}; set both or neither")
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

    def words(self) -> str:
        """What is read and gathered, in a line."""
        text = f"{self.samples} rows of {self.sequence_length} tokens, {', '.join(self.axes) or 'all axes'} by "
        text += "; ".join(self.criteria) + (f" of {self.method}" if self.method != "activation" else "")
        sizes = ", ".join(map(str, self.depth_sizes))
        scans = [f"{name} without blocks of {sizes} layers" for name in self.depth if name in SCANS]
        scans += [f"removal of {self.remove} layers"] if REMOVAL in self.depth else []
        return text + (f"; {' and '.join(scans)}, on {self.depth_samples} rows" if scans else "")

    def marks(self, *identity: str) -> dict[str, str]:
        """What is gathered -> a digest of what decides it: its settings and `identity` (of model, data, layout)."""
        from nemo_minitron.artifacts.files import digest_of, file_digest

        found = {}
        for name in (STATISTICS, *self.depth):
            settings = [getattr(self, setting) for setting in DECIDE[name]]
            extra = [file_digest(self.items)] if name == "accuracy" else []
            found[name] = digest_of([name, settings, *extra, *identity])
        return found

    def for_plan(self, depth: str, dropped: int) -> Calibration:
        """This calibration and what a plan that drops so many layers by the criterion `depth` asks for.

        Raises InputError for an unknown criterion, one without layers to drop, and what `Calibration` refuses.
        """
        if depth == BLOCK_INFLUENCE:
            return self
        if depth not in DEPTH:
            raise InputError(f"depth '{depth}' is unknown; {nearest(depth, (BLOCK_INFLUENCE, *DEPTH))}")
        if not dropped:
            raise InputError(f"depth '{depth}' chooses layers and the recipe cuts none; set keep.layers, or leave it")
        names = tuple(dict.fromkeys([*self.depth, depth]))
        if depth == REMOVAL:
            return dataclasses.replace(self, depth=names, remove=max(self.remove, dropped))
        return dataclasses.replace(self, depth=names, depth_sizes=tuple(sorted({*self.depth_sizes, dropped})))


def axes_of(architecture: Architecture) -> list[str]:
    """What the built-in estimators score of a model of one of the families."""
    found = ["heads", "head_channels", "norms", "layers", *DERIVED]
    found += ["ffn", "ffn_pre_activation"] if architecture.dense_layers else []
    found += ["q_norm", "k_norm"] if architecture.qk_norm else []
    found += ["experts", "expert_ffn"] if architecture.moe_layers else []
    return found + (["shared_expert_ffn"] if architecture.moe_shared_expert_intermediate_size else [])
