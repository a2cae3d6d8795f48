"""Losses between student and teacher logits, one file each, one contract.

A loss takes logits [..., V/tp] (this tensor-parallel rank's shard of the vocabulary, bf16 or fp32) and gives
[...] in fp32, per token; `group` is the tensor-parallel process group. Value and gradient are those of the
unsharded loss.
"""

from nemo_minitron.distillation.losses.forward_kl import forward_kl

__all__ = ["forward_kl"]
