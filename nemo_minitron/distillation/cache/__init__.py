"""The cached teacher: samples of its distribution, or its largest probabilities, written once and used many times.

The gradient of the forward KL in a student's logits is T (p_s - p), linear in the teacher's p. So any p' with the
expectation p gives the gradient of the full forward KL in expectation (RS-KD, 2503.16870). The cross-entropy of the
student against p' has that gradient.
"""

from nemo_minitron.distillation.cache.losses import CachedTargets, cached_top_k_kl, sampled_cross_entropy
from nemo_minitron.distillation.cache.make import make
from nemo_minitron.distillation.cache.sampling import draw, top, uniforms
from nemo_minitron.distillation.cache.teacher import CachedTeacher

__all__ = [
    "CachedTargets",
    "CachedTeacher",
    "cached_top_k_kl",
    "draw",
    "make",
    "sampled_cross_entropy",
    "top",
    "uniforms",
]
