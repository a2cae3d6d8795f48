"""The built-in estimators, one file a kind of module; importing this registers them all."""

from nemo_minitron.importance.estimators import dense, latent, mamba, moe
from nemo_minitron.importance.registry import REGISTRY, Estimator, Watch, estimator, estimators_of

__all__ = ["REGISTRY", "Estimator", "Watch", "dense", "estimator", "estimators_of", "latent", "mamba", "moe"]
