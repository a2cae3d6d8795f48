"""Losses between student and teacher logits, one file each, one contract.

A loss takes logits [..., V/tp] (this tensor-parallel rank's shard of the vocabulary, bf16 or fp32) and gives
[...] in fp32, per token, the same on every rank of `group`, the tensor-parallel process group (None: the
vocabulary is whole). Value and gradient are those of the unsharded loss. The teacher is a constant.

`temperature` T divides both logits; the loss is multiplied by T^2. `vocab_size`: where it is given, the shards are
Megatron's, padded: rank r holds columns r * W to (r + 1) * W, and what lies at and beyond `vocab_size` takes no part
(its gradient is 0); the teacher's padding may be another than the student's, which costs one more collective, a
re-sharding of the teacher's logits. Where it is None, every column counts and the two shapes must be equal. A token
to be ignored is multiplied by 0 afterwards; the fused head (`nemo_minitron.distillation.fused_head`) skips it.

`in_place`: the gradient is written over the student's logits, which are lost. Memory beyond the inputs is then a
few small chunks; without it, one gradient more, in the logits' dtype. Backward runs once.

A logit of -inf is a token that a model excludes: forward KL, reverse KL, Jensen-Shannon and top-k KL say what it does
there; cosine and MSE want finite logits. NaN, and a token that excludes everything, give NaN.

Raised by all: ValueError for shapes that differ, a vocabulary that does not fit and a temperature that is not positive
and finite.
"""

from nemo_minitron.distillation.losses.cosine import cosine
from nemo_minitron.distillation.losses.forward_kl import forward_kl
from nemo_minitron.distillation.losses.jensen_shannon import jensen_shannon
from nemo_minitron.distillation.losses.mse import mse
from nemo_minitron.distillation.losses.reverse_kl import reverse_kl
from nemo_minitron.distillation.losses.top_k_kl import top_k_kl

__all__ = ["cosine", "forward_kl", "jensen_shannon", "mse", "reverse_kl", "top_k_kl"]
