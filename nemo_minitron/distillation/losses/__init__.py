"""Losses between student and teacher logits, one file each, one contract.

A loss takes logits [..., V/tp] (this tensor-parallel rank's shard of the vocabulary, bf16 or fp32) and gives
[...] in fp32, per token. The result is the same on every rank of `group`, the tensor-parallel process group. If `group`
is None, the logits have the whole vocabulary. Value and gradient are those of the unsharded loss. The teacher is a
constant.

`temperature` T divides both logits, and the loss is multiplied by T^2. If `vocab_size` is given, the shards are padded
as Megatron pads them: rank r holds the columns r * W to (r + 1) * W, and those at and beyond `vocab_size` take no part
(their gradient is 0). The teacher may be padded differently from the student; then the teacher's logits are re-sharded,
which is one more collective. If `vocab_size` is None, every column counts and the two shapes must be equal. To ignore a
token, multiply its loss by 0. The fused head (`nemo_minitron.distillation.fused_head`) skips such a token.

`in_place`: the gradient is written over the student's logits, which are lost. Then the loss needs a few small chunks of
memory beyond its inputs; otherwise also a gradient in the logits' dtype. The backward pass can run only once.

A logit of -inf is a token that a model excludes. Forward KL, reverse KL, Jensen-Shannon and top-k KL say what they do
with it; cosine and MSE need finite logits. NaN gives NaN, and so does a model that excludes every token.

All raise ValueError if the shapes differ, if the shards do not hold the vocabulary, and if the temperature is not
positive and finite.
"""

from nemo_minitron.distillation.losses.cosine import cosine
from nemo_minitron.distillation.losses.forward_kl import forward_kl
from nemo_minitron.distillation.losses.jensen_shannon import jensen_shannon
from nemo_minitron.distillation.losses.mse import mse
from nemo_minitron.distillation.losses.reverse_kl import reverse_kl
from nemo_minitron.distillation.losses.top_k_kl import top_k_kl

__all__ = ["cosine", "forward_kl", "jensen_shannon", "mse", "reverse_kl", "top_k_kl"]
