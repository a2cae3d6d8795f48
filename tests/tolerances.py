"""Every tolerance of the tests, each with its reason."""

# Scores of two layouts of one model in fp32: sums over channels and tokens are taken in another order.
# Relative to the largest score of the row.
SCORES_FP32 = 1e-5

# Scores of an fp32 pass against transformers in float64: products of pico models' sums (width 48 to 96, six layers)
# are rounded on the way; a variance over samples is a difference of near numbers. Relative to the row's largest.
SCORES_FLOAT64 = 2e-5

# fp32 logits of Megatron and transformers on SmolLM2-135M: 30 layers of matrix products in another order
# (QKV and gate/up fused, SDPA for both). Absolute, logits reach about 30.
LOGITS_FP32 = 1e-3

# fp32 logits of pico models (6 layers, width 48): the same, with far shorter sums. Absolute.
LOGITS_PICO_FP32 = 2e-5

# A KL in fp32 against float64: exponentials and their sum over the vocabulary. Relative to 1 + KL, per token.
KL_FP32 = 1e-6

# Its gradient with respect to a logit: a difference of two probabilities, each right to a few units of fp32. Absolute.
KL_GRADIENT_FP32 = 5e-7

# Mamba's scan by chunks against its recurrence: exponentials of sums, in float64; in fp32 against float64 the gradient
# of a decay sums over positions, heads and channels. Relative to the tensor's largest.
SCAN_FLOAT64 = 1e-13
SCAN_FP32 = 5e-6

# bf16 keeps 8 bits: a gradient stored in bf16 is right to half a unit in the last place. Relative.
GRADIENT_BF16 = 2**-8

# Training losses of two layouts over a few fp32 steps: gradients are summed in another order. Relative.
LOSS_LAYOUT_FP32 = 1e-4

# The fp32 sum of 40,000 exponentials, whose order is the processor's. Relative.
CROSS_ENTROPY_FP32 = 1e-5

# loss.csv has six decimals: losses as near to each other as you like may differ by one in the last. Absolute.
LOSS_PRINTED = 1.01e-6

# LM losses of two layouts, or of Megatron and transformers, with layers dropped: fp32 logits of sums in another
# order, then a mean over tokens. Relative.
DEPTH_LOSS_FP32 = 1e-5

# A normalised logit error: a difference of logits that are each right to some units of fp32. Relative.
DEPTH_ERROR_FP32 = 1e-5

# One training step of a pico model in two layouts in fp32: sums in another order, over four layers. Relative: the
# loss, the norm of all gradients, and a gradient's largest difference over its largest element (much cancels there).
STEP_LOSS_FP32 = 1e-6
STEP_NORM_FP32 = 1e-5
LAYOUT_GRADIENT_FP32 = 1e-5

# p / q and p of a teacher's tokens: exponentials of fp32 logits, sums in float64, stored as fp32. Relative, or absolute
# where it is a mass.
SAMPLE_RATIO_FP32 = 1e-6

# A border of the cumulative distribution in another layout, or in float64: fp32 logits of sums in another order
# (LOGITS_PICO_FP32), and their exponentials. A draw that lies no nearer to a border must be the same. Absolute.
SAMPLE_BORDER_FP32 = 2e-5

# A KL against p that a cache rounded to fp32: their sum is 1 to a few units, times the log of the student's sum.
# Relative to 1 + KL, per token.
CACHED_KL_FP32 = 5e-6

# One token's KL of two pico models, through fp32 layers of both, against float64's: log probabilities of about 6 that
# are right to a unit or two. Absolute.
TOKENS_KL_FP32 = 2e-6

# A least-squares solution kept in fp32, against float64's by another algorithm (lstsq): elements below 1. Absolute.
SOLVED_FP32 = 1e-6

# Gram matrices of fp32 activations against float64: activations carry some units of fp32 from the layers before, and
# products are summed in fp32 within a micro-batch. Relative to the largest element.
GRAM_FP32 = 5e-6

# Matrices after some 80 steps of Adam on fp32 activations, against float64: Adam divides each gradient by its own size,
# so that an element whose gradient is nearly 0 can move by a share of the rate (2e-3 here). Absolute, of matrices with
# elements of 0.1.
RECONSTRUCTED = 1e-4

# A matrix that fills a gap, its neurons cut: sums of fp32 activations of 180 tokens, solved in float64. Measured: up to
# 7e-6, in sequence parallelism, of changes of up to 0.7. Absolute.
FILLED = 5e-5

# A loss between intermediate states of pico models against float64: norms and a projection of fp32 states that went
# through a few layers. Relative. Its gradients went back through them too: relative to the tensor's largest element.
STATE_LOSS_FP32 = 1e-5
STATE_GRADIENT_FP32 = 5e-5

# Bytes that autograd keeps of the reference layers over those counted, which are of Transformer Engine's fused layers:
# norms, rotation and SwiGLU are several operations there (1.1 to 1.8 times as much in the cases tested). Factor.
ACTIVATIONS_REFERENCE = 2.0

# Reverse KL's gradient: a probability times a difference of log ratios; logits over T reach about 30 and are right to
# a unit of fp32 (1e-6) there. Absolute.
LOG_RATIO_GRADIENT_FP32 = 2e-6

# The fused head in fp32 against float64: logits are sums over the hidden size. Relative, to 1 + KL or to the largest
# gradient. In bf16 logits are rounded as any bf16 output layer's are (2**-9 of a logit, which reaches about 10), and
# the gradients of logits and hidden states once more each.
FUSED_FP32 = 2e-6
FUSED_BF16 = 2**-5

# Distillation losses against a teacher whose weights and activations are rounded to bf16 (8 bits) over six layers; the
# KL of pico models is small, a difference of near distributions. Relative.
LOSS_BF16_TEACHER = 0.1

# The FP8 emulation's products in fp32 against float64 ones of the same rounded operands: sums of 160 terms. Relative to
# the largest element.
FP8_PRODUCT = 1e-6

# A mean of sums of min(p, q) against float64: softmaxes of fp32 logits of pico models (LOGITS_PICO_FP32, times the 3
# by which the test enlarges the head). Relative.
ACCEPTANCE_FP32 = 1e-4

# Scores of a random pico model in bf16 against fp32: operands are rounded by 2**-9 of themselves, and six layers add
# up. Relative to the layer's largest; about three times what the reference layers showed.
BF16_SCORES = 0.03

# What FP8 does to a random pico model, against bf16 (bounds of what FP8 may do, not of arithmetic): E4M3 rounds an
# operand by 2**-4 of itself at most, and six layers add up. Scores: relative to the
# layer's largest. Overlap of kept sets and rank correlation: what they lack of 1, of scores that lie close together.
# KL: nats a token. Gradients in E5M2 (2**-3): the norm of the difference, relative. Each is about twice what was seen.
FP8_SCORES = 0.3
FP8_OVERLAP = 0.06
FP8_KL = 0.005
FP8_GRADIENT = 0.4

# Two FP8 linears in two ranks under delayed scaling: the same FP8 values, products summed in another order (96 terms).
FP8_LAYOUT = 1e-5

# A loss between softmaxes, as a part of it, of whatever size and at any temperature: fp32 sums of at most 509 terms,
# whose rounding counts in the second order alone (`losses/_softmax.py`). Observed: 6e-4, top-k's at T = 100.
SMALL_LOSS_FP32 = 2e-3

# First gradients of a pico mixture, through fp32 layers and back, against float64's. Relative to the tensor's largest.
FIRST_GRADIENT_FP32 = 2e-4

# KL of a model from itself: fp32 rounding, printed with six decimals. Adam makes of any gradient, such as that
# rounding, steps of the learning rate, here 1e-6 a weight, whose KL is of the second order. Absolute, nats a token.
# (Steps of 1e-5 gave 1.5e-5.)
ITSELF_KL = 2e-6

CONTRAST = 4.5  # of words on their background: WCAG 2.2, level AA, text of any size

# A rotated weight: a sum of hidden_size products in float64, of weights and an orthonormal basis, rounded once to fp32.
# Relative, and absolute for a diagonal of numbers about 1.
ROTATED_FP32 = 2e-7
