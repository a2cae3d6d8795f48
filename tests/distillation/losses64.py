"""The losses' cases, their inputs and the float64 reference, for `losses_worker.py` and the tests that run it."""

import itertools
import math

NAMES = ("forward_kl", "reverse_kl", "jensen_shannon", "cosine", "mse", "top_k_kl")
COLLECTIVES = {"jensen_shannon": 2}  # of the others 1; one more where the teacher's padding is another
LAYOUTS = [  # vocabulary; what a rank's student and teacher shards are wider than need be (None: no padding at all)
    (509, None, None),
    (509, 0, 0),
    (509, 0, 1),  # at TP = 4 the student is padded to 512, the teacher to 516
    (509, 300, 5),  # the last ranks hold student padding alone
    (2, None, None),  # at TP = 3 the last rank holds no column at all
]
SHAPES = [((3, 5), 1.0, 1 << 20), ((7,), 3.0, 600), ((5,), 1.0, 600), ((2, 1, 2), 0.5, 1)]  # tokens, temperature, chunk
DTYPES = ("float32", "bfloat16")
CASES = [
    {"loss": loss, "layout": layout, "shape": shape, "temperature": t, "chunk": chunk, "dtype": dtype, "k": k}
    for loss, layout, (shape, t, chunk), dtype in itertools.product(NAMES, LAYOUTS, SHAPES, DTYPES)
    for k in ((1, 40, 600) if loss == "top_k_kl" else (None,))
]
SOFTMAXES = ("forward_kl", "reverse_kl", "jensen_shannon", "top_k_kl")
EXCLUDED = ("teacher", "both", "student", "shard", "teacher's shard")  # who has -inf, and where
EDGES = [
    {"loss": loss, "edge": edge, "temperature": t, "k": 40 if loss == "top_k_kl" else None}
    for loss, edge, t in itertools.product(SOFTMAXES, EXCLUDED, (1.0, 3.0))
]
EDGES += [
    {"loss": loss, "edge": f"apart by {apart}", "temperature": t, "k": 40 if loss == "top_k_kl" else None}
    for loss in SOFTMAXES
    for apart, t in ((0.03, 10.0), (0.03, 100.0), (3.0, 10.0), (60.0, 2.0), (300.0, 2.0))
]
FUSED = [
    {"layout": layout, "dtype": dtype, "sp": sp, "given": given, "mask": mask, "temperature": 1.0 + mask}
    for layout, dtype, sp, (given, mask) in itertools.product(
        [layout for layout in LAYOUTS if layout[1] is not None], DTYPES, (False, True), ((0, 0), (0, 1), (1, 1))
    )
]


def reference(name, student, teacher, temperature=1.0, k=None):
    """The loss of float64 logits [..., V], by the book; autograd gives its gradient."""
    import torch

    log_s, log_t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    if name == "cosine":
        return 1 - torch.cosine_similarity(student, teacher, -1)
    if name == "mse":
        return (student - teacher).square().mean(-1)
    if name == "top_k_kl" and k < student.shape[-1]:
        first = teacher.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        chosen = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, first, True)
        log_s, log_t = (
            torch.cat([x.gather(-1, first), x.masked_fill(chosen, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for x in (log_s, log_t)
        )
    pairs = {"reverse_kl": [(log_s, log_t)], "jensen_shannon": []}.get(name, [(log_t, log_s)])
    if name == "jensen_shannon":
        neither = torch.isinf(log_s) & torch.isinf(log_t)
        middle = torch.logaddexp(log_s.masked_fill(neither, 0), log_t.masked_fill(neither, 0)) - math.log(2)
        pairs = [(log_t, middle), (log_s, middle)]
    kl = [_kl(p, q) for p, q in pairs]
    return sum(kl) / len(kl) * temperature**2


def _kl(p, q):
    """sum e^p (p - q), where a p of -inf adds nothing, of logarithms [..., V]; with a derivative there."""
    nothing = p == -float("inf")
    return (p.exp() * (p.masked_fill(nothing, 0) - q.masked_fill(nothing, 0))).sum(-1)


def random(vocab, shape, dtype, seed=0):
    """Student and teacher logits [*shape, V], and weights of the tokens, of which the first does not count."""
    import torch

    generator = torch.Generator().manual_seed(1000 * vocab + seed)
    logits = [torch.randn(*shape, vocab, generator=generator).mul(3).to(getattr(torch, dtype)) for _ in "st"]
    weights = torch.rand(shape, generator=generator)
    weights.view(-1)[0] = 0
    return *logits, weights


def shard(whole, extra, rank, world):
    """(This rank's rows of [V, ...], how many are true): padded with NaN, or unpadded, when a rank may hold fewer."""
    import torch

    width = -(-len(whole) // world) + (extra or 0)
    rows = whole[rank * width : (rank + 1) * width]
    if extra is None:
        return rows.clone(), len(rows)
    filling = whole.new_full((width - len(rows), *whole.shape[1:]), torch.nan)
    return torch.cat([rows, filling]), len(rows)


def edge_logits(edge, vocab):
    """Student and teacher logits [6, V], fp32: close together, far apart, or with -inf for one or both of them."""
    import torch

    student, teacher, _ = random(vocab, (6,), "float32", seed=7)
    if edge.startswith("apart by"):
        return (teacher + student / 3 * float(edge.split()[-1])), teacher
    third = slice(vocab // 3 + 1, 2 * (vocab // 3))
    places = {"shard": slice(0, 2 * (vocab // 3) + 2), "teacher's shard": third}.get(edge, slice(5, vocab, 7))
    for logits, who in ((student, "student"), (teacher, "teacher")):
        if edge in (who, "both", "shard") or edge == f"{who}'s shard":
            logits[:, places] = -torch.inf
    return student, teacher
