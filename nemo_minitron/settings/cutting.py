"""What a student gets beyond plain slices of its teacher: re-fitted matrices, folded norms, scales behind dropped
layers, the residual of heads, merged experts."""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.defaults import AUTO, RIDGE, SIGNS
from nemo_minitron.schema import setting
from nemo_minitron.settings.reconstruction import rows_of_step
from nemo_minitron.settings.validated import ValidatedSettings

MEMORY = 4.0  # GB (10^9 bytes) of Gram matrices on a rank
ROTATE = "Rotate the residual stream to its principal axes before hidden channels are scored and cut; it needs RMSNorm."
FOLD = "Scale RMSNorms by sqrt(all / kept) where hidden channels are cut."
GAPS = "Scale what is written to the residual stream behind dropped layers to the stream's length there."
FILL = "Re-fit the last matrix in front of dropped layers to write what these wrote; scale what is written behind them."
DAMPING = (
    "Damping of the least squares, as a share of the mean squared input; auto: for each matrix what serves rows best "
    "that its fit did not read."
)
PASSES = (
    "Passes over the calibration in which attention, MLPs, experts and Mamba mixers that lost units are fitted as a "
    "whole, after the least squares; 0: none."
)
BATCH = "Rows of one step of that fit, of all data-parallel ranks together."
RESIDUAL = (
    "Add the residual of pruned heads to the heads that stay: paper, or laco (the other sign). It needs --scores."
)
MERGE = (
    "Average each dropped expert into the kept expert of its layer that is most like it, by how often each was chosen. "
    "It needs --scores."
)


@dataclasses.dataclass(frozen=True)
class Cutting(ValidatedSettings):
    """What the student gets beyond plain slices of its teacher.

    `compensate`: the matrices that lose inputs to a cut of neurons or heads are re-fitted, by least squares on the
    calibration's activations, damped by `ridge`; false leaves the papers' pure selection.
    `ridge`: a share of the mean squared input, or auto (`pruning/ridge.py`): each half of the samples then has Gram
    matrices of its own, which doubles their memory, and each matrix gets the ridge with which fits to one half leave
    the least error on the other.
    `memory`: GB (10^9 bytes) of Gram matrices on a rank. A layer (and expert) takes ffn^2 x 8 bytes (twice that with
    ridge=auto), divided among the ranks that share it. One pass of the calibration serves as many layers as fit, at
    least one.
    `reconstruct`: passes over the calibration in which each sub-block that lost units learns, as a whole, to write what
    the teacher's writes (`megatron/reconstruct.py`; 2510.14444), in steps of `reconstruct_batch` rows. It starts from
    the least squares, and each rank holds a second copy of the model in fp32 for it.
    `rotate`: the teacher is scored and cut in rotated coordinates of its residual stream (`pruning/rotation.py`), so
    that a cut of hidden channels loses less. The student learns from the teacher as it is. A run holds one more copy
    of the teacher's weights for it.
    `fold_norms`: where hidden channels are cut, RMSNorms are scaled for the smaller number of channels. LayerNorms, for
    which no factor is exact, stay as they are.
    `scale_gaps`: where layers are dropped, what is written to the residual stream behind them is scaled to the length
    that the stream has there (`pruning/gaps.py`). A calibration that does not score the stream (another `method` than
    activation, or `axes` without it) leaves the slices as they are.
    `fill_gaps`: where layers are dropped, the last matrix in front of them also learns to write what they wrote, by
    least squares on the calibration's activations (`pruning/gaps.py`). It scales as `scale_gaps` does, by the stream
    of this calibration. It needs `compensate`.
    `head_residual` ("paper", "laco" or none): see `pruning/compensation.py`.
    `merge_experts`: dropped experts are averaged into kept ones (`pruning/merging.py`) instead of being thrown away.
    Where neurons of experts are cut, too, it does not go with `compensate`, whose least squares hold for a kept expert
    alone.

    Raises InputError for a ridge or a memory that is not finite and above 0, an unknown residual, a head residual
    together with `compensate`, and `reconstruct` without it.
    """

    compensate: bool = setting(True, "Re-fit the matrices that lose inputs to the cut; false: pure selection.")
    ridge: float | str = setting(RIDGE, DAMPING, above_zero=True, legal=(AUTO,))
    memory: float = setting(
        MEMORY, "GB of Gram matrices on each rank; it limits how many layers one pass serves.", above_zero=True
    )
    reconstruct: int = setting(0, PASSES, least=0)
    reconstruct_batch: int = setting(1, BATCH, derived=True, least=1)
    rotate: bool = setting(False, ROTATE)
    fold_norms: bool = setting(True, FOLD)
    scale_gaps: bool = setting(True, GAPS)
    fill_gaps: bool = setting(False, FILL)
    head_residual: str = setting("", RESIDUAL, legal=("", *SIGNS))
    merge_experts: bool = setting(False, MERGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruct and not self.compensate:
            raise InputError(
                "reconstruct starts from the least squares; leave cutting.compensate=true, or set 0 passes"
            )
        if self.fill_gaps and not self.compensate:
            raise InputError("fill_gaps is a re-fit; leave cutting.compensate=true, or set cutting.fill_gaps=false")
        if self.head_residual and self.compensate:
            raise InputError("head_residual changes the heads that compensate re-fits; set cutting.compensate=false")

    def deciding(self) -> dict[str, object]:
        """Name -> value of the settings that decide the student's weights."""
        values = dataclasses.asdict(self)
        leave = {"memory"} if self.compensate else {"memory", "ridge"}
        leave |= set() if self.reconstruct else {"reconstruct", "reconstruct_batch"}
        leave |= {name for name in ("merge_experts", "rotate", "fill_gaps") if not getattr(self, name)}
        for name in leave:
            del values[name]
        return values

    @property
    def gram_copies(self) -> int:
        """Gram matrices of each input: one, or one of each half of the samples."""
        return 2 if self.ridge == AUTO else 1

    def fitting(self) -> object:
        """Plain values that decide what the least squares, and the fit after them, give."""
        fits = [self.reconstruct, int(self.reconstruct_batch)] * bool(self.reconstruct)
        return [self.ridge, *fits, *["fill_gaps"] * self.fill_gaps] if fits or self.fill_gaps else self.ridge

    def rows_of_step(self, rows: int, ranks: int) -> int:
        """The rows of a step of the reconstruction, of `rows` and on so many data-parallel ranks. Raises InputError if
        they do not serve; without a reconstruction nothing is asked of them."""
        if not self.reconstruct:
            return int(self.reconstruct_batch)
        return rows_of_step(rows, self.reconstruct_batch, ranks)

    def folds(self, source: Architecture, target: Architecture) -> bool:
        """Whether this cut's norms are scaled."""
        from nemo_minitron.pruning.compensation import can_fold

        return self.fold_norms and can_fold(source, target)

    def merges(self, source: Architecture, target: Architecture) -> bool:
        """Whether this cut's dropped experts are merged into kept ones."""
        from nemo_minitron.pruning.merging import can_merge

        return self.merge_experts and can_merge(source, target)

    def scales(self, source: Architecture, target: Architecture, stream: bool) -> bool:
        """Whether what this cut leaves behind dropped layers is scaled by the scores. `stream`: the calibration scores
        the stream."""
        return self.scale_gaps and not self.fill_gaps and stream and source.num_layers != target.num_layers

    def check(self, source: Architecture, target: Architecture, searched: bool) -> None:
        """Raises InputError for a setting that this cut cannot have. `searched`: a search will find the sizes."""
        from nemo_minitron.pruning.compensation import check_residual
        from nemo_minitron.pruning.reconstruction import check_reconstruction
        from nemo_minitron.pruning.rotation import check_rotation

        if self.rotate:
            check_rotation(source)
            if not searched and source.hidden_size == target.hidden_size:
                raise InputError("rotate serves a cut of hidden channels, and the job cuts none; leave it off")
        if self.fill_gaps and not searched and source.num_layers == target.num_layers:
            raise InputError("fill_gaps serves a cut of layers, and the job drops none; leave it off")
        if self.reconstruct and not searched:
            check_reconstruction(source, target)
        if self.head_residual and searched:
            raise InputError("head_residual needs sizes in keep; the shapes of a search keep all heads")
        if self.head_residual:
            check_residual(source, target, self.head_residual)
        if self.merge_experts:
            self._check_merge(source, target, searched)

    def _check_merge(self, source: Architecture, target: Architecture, searched: bool) -> None:
        from nemo_minitron.pruning.merging import check_merge

        if not searched or not source.num_moe_experts:
            check_merge(source, target)
        if self.reconstruct:
            raise InputError("merge_experts averages experts, and reconstruct fits them; set one of them off")
        if self.compensate and (searched or source.moe_ffn_hidden_size != target.moe_ffn_hidden_size):
            raise InputError(
                "merge_experts averages experts whose last matrices compensate re-fits after a cut of expert_ffn; set "
                "cutting.compensate=false, or keep expert_ffn whole without a search"
            )
