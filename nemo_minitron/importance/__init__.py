"""Running model + calibration batches -> Scores, with forward passes only, in any layout.

`estimate` runs the batches itself. Under NeMo's trainer the `Importance` callback opens the same Collector. Scores to
compare with: `estimate(..., method="taylor")`, and `magnitude` and `random_scores`, which need no forward pass. For an
estimator of your own subclass `Estimator` and decorate it with `@estimator(ModuleType)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.lazy import loader

if TYPE_CHECKING:
    from nemo_minitron.importance.alternatives import magnitude, random_scores
    from nemo_minitron.importance.collector import Collector
    from nemo_minitron.importance.estimators import Estimator, Watch, estimator
    from nemo_minitron.importance.forward import estimate
    from nemo_minitron.importance.reduction import reduce

__all__ = ["Collector", "Estimator", "Watch", "estimate", "estimator", "magnitude", "random_scores", "reduce"]

__getattr__ = loader(
    __name__,
    {
        "Collector": ".collector", "estimate": ".forward", "Estimator": ".estimators", "Watch": ".estimators",
        "estimator": ".estimators", "magnitude": ".alternatives", "random_scores": ".alternatives",
        "reduce": ".reduction",
    },
)  # fmt: skip
