"""Run under torchrun: losses on vocabulary shards against the unsharded float64 reference, on every rank."""

import json
import sys
from datetime import timedelta
from pathlib import Path

CASES = [  # vocabulary, shape of tokens, temperature, dtype
    (509, (3, 5), 1.0, "float32"),
    (509, (7,), 2.0, "float32"),
    (512, (2, 3), 0.5, "float32"),
    (2, (4,), 1.0, "float32"),  # at world 3 the last rank holds no column at all
    (509, (3, 5), 1.0, "bfloat16"),
]


def reference(student, teacher, temperature, weights):
    """Value and gradient in float64, by autograd."""
    import torch

    s = student.double().requires_grad_()
    log_s, log_t = ((x / temperature).log_softmax(-1) for x in (s, teacher.double()))
    loss = (log_t.exp() * (log_t - log_s)).sum(-1) * temperature**2
    (loss * weights.double()).sum().backward()
    return loss.detach(), s.grad if s.grad is not None else torch.zeros_like(s)


def run_case(vocab, shape, temperature, dtype, rank, world):
    import torch

    from nemo_minitron.distillation.losses import forward_kl

    generator = torch.Generator().manual_seed(vocab)
    student, teacher = (torch.randn(*shape, vocab, generator=generator).mul(3).to(getattr(torch, dtype)) for _ in "st")
    weights = torch.rand(shape, generator=generator)
    part = -(-vocab // world)
    mine = slice(min(vocab, rank * part), min(vocab, (rank + 1) * part))
    local = student[..., mine].detach().clone().requires_grad_()
    group = torch.distributed.group.WORLD
    loss = forward_kl(local, teacher[..., mine], temperature, group)
    (loss * weights).sum().backward()
    value, gradient = reference(student, teacher, temperature, weights)
    wrong = (local.grad.double() - gradient[..., mine]).abs()
    return {
        "value": ((loss.double() - value).abs() / (1 + value)).max().item(),
        "gradient": wrong.max().item() if wrong.numel() else 0.0,
        "largest": gradient.abs().max().item(),
        "finite": bool(torch.isfinite(loss).all()),
    }


def main():
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = [run_case(*case, rank, world) for case in CASES]
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
