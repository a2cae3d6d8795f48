"""The first step of a mixture's distillation by the book: a plain transformers Mixtral in float64 and autograd."""

import numpy as np
import torch
import torch.nn.functional as F


def first_step(student, teacher, batches, top_k=None, aux=0.0):
    """({canonical name: gradient in float64}, the routers' loss). `batches`: arrays [micro-batches, S] by name.

    The loss is the mean of the KL over the tokens that count, of all micro-batches, plus `aux` times the routers'
    losses; a micro-batch's routers' loss is weighted by its tokens.
    """
    from nemo_minitron.pruning import HFSource

    model, target, tokens = _float64(student), _float64(teacher), torch.from_numpy(batches["tokens"])
    mask = torch.from_numpy(batches["loss_mask"]).double()
    balance, loss = [], 0.0
    for row, counted in zip(tokens, mask, strict=True):
        found = model(row[None], output_router_logits=True)
        with torch.no_grad():
            wanted = target(row[None]).logits
        loss = loss + (_kl(found.logits[0], wanted[0], top_k) * counted).sum()
        balance.append(sum(_balance(logits, model.config.num_experts_per_tok) for logits in found.router_logits))
    total = loss / mask.sum() + aux * sum(balance) * tokens.shape[1] / mask.sum()
    total.backward()
    source, parameters = HFSource(student), dict(model.named_parameters())
    names = source.family.hf_tensors(source.architecture)  # a tensor of its own each, in a Mixtral
    gradients = {parts[0]: parameters[name].grad.numpy() for name, parts in names.items()}
    return gradients, float(sum(balance)) / len(balance)


def _kl(student, teacher, top_k):
    """The KL of the teacher to the student, [S, V] -> [S]; with `top_k`, over the teacher's likeliest tokens and all
    others as one."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    if top_k:
        first = teacher.topk(top_k, -1).indices
        log_s, log_t = (
            torch.cat([x.gather(-1, first), x.scatter(-1, first, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for x in (log_s, log_t)
        )
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _float64(folder):
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64, attn_implementation="eager")
    for module in model.modules():
        if isinstance(module, MixtralRMSNorm):  # transformers' own goes through fp32
            module.forward = lambda x, m=module: m.weight * F.rms_norm(x, x.shape[-1:], eps=m.variance_epsilon)
    return model


def _balance(logits, top_k):
    """The loss of the Switch Transformer (2101.03961): experts x sum of (share of tokens x mean probability)."""
    tokens, experts = logits.shape
    chosen = logits.topk(top_k, -1).indices.flatten().bincount(minlength=experts)
    return experts * (chosen / (tokens * top_k) * logits.softmax(-1).mean(0)).sum()


def farthest(found, expected):
    """Each tensor's largest error as a part of its largest element; sorted, the worst first, with names."""
    assert found.keys() == expected.keys()
    wrong = {name: np.abs(found[name] - x).max() / max(np.abs(x).max(), 1e-12) for name, x in expected.items()}
    return sorted(((error, name) for name, error in wrong.items()), reverse=True)
