"""Scores by the book, of bare Megatron models: float64, sample by sample, every activation kept, plain formulas.

Of a mixture of experts only the layer's input is taken from the model: routing, experts and their outputs are
written out here. For Taylor every activation keeps its gradient; the loss is torch's own cross entropy.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from scores64 import AGGREGATE, scores64

ROUTED = ("experts", "expert_ffn")


def scores_by_the_book(model, samples, criteria, vocab_size=None):
    """`criterion/statistic` -> float64 array; with a true `vocab_size` those of activations times gradients."""
    found = Taylor(model, vocab_size) if vocab_size else Activations(model)
    for sample in samples:
        found.run(torch.as_tensor(sample)[None])
    found.close()
    scores = {}
    for criterion in criteria:
        of_samples = {n: rows for n, rows in found.kept.items() if n not in ROUTED}
        scores |= {f"{criterion}/{name}": values for name, values in scores64(of_samples, criterion).items()}
        for name in set(ROUTED) & set(found.kept):
            scores[f"{criterion}/{name}"] = routed64(found.kept[name], criterion)
    return scores


def routed64(rows, criterion):
    """[rows, experts, ...] of row -> expert -> tokens of each sample: all its tokens together."""
    over = AGGREGATE[criterion.split(",")[1]]

    def expert(samples):
        tokens = np.concatenate(samples)
        return over(tokens) if len(tokens) else np.zeros(tokens.shape[1:])

    return np.stack([np.stack([expert(rows[row][e]) for e in sorted(rows[row])]) for row in sorted(rows)])


class Kept:
    """Hooks on the one chunk of a float64 model."""

    def __init__(self, model):
        self.model, self.config, self.kept, self.handles = model, model.config, {}, []
        for i, layer in enumerate(model.decoder.layers):
            self.watch(i, layer)
        self.on(model.decoder.final_layernorm, "norms", 2 * len(model.decoder.layers), *self.norm_of(None))

    def on(self, module, statistic, row, part, expert=None):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            self.keep(statistic, row, expert, part(module, given, output[0] if isinstance(output, tuple) else output))

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def put(self, statistic, row, expert, values):
        rows = self.kept.setdefault(statistic, {})
        place = rows.setdefault(row, []) if expert is None else rows.setdefault(row, {}).setdefault(expert, [])
        place.append(values.detach().numpy())

    def close(self):
        for handle in self.handles:
            handle.remove()


class Activations(Kept):
    def keep(self, statistic, row, expert, values):
        self.put(statistic, row, expert, values.flatten(0, 1) if values.dim() > 2 else values)

    @torch.no_grad()
    def run(self, tokens):
        self.model(tokens, torch.arange(tokens.shape[1])[None], None)

    def norm_of(self, fused):
        def normed(module, x, output):
            weight = module.layer_norm_weight if fused else module.weight
            bias = getattr(module, "layer_norm_bias" if fused else "bias", None)
            gamma = weight + 1 if self.config.layernorm_zero_centered_gamma else weight
            if self.config.normalization == "RMSNorm":
                return x / (x.square().mean(-1, keepdim=True) + self.config.layernorm_epsilon).sqrt() * gamma
            centred = x - x.mean(-1, keepdim=True)
            spread = (x.var(-1, unbiased=False, keepdim=True) + self.config.layernorm_epsilon).sqrt()
            return centred / spread * gamma + bias

        return (normed,)

    def norm(self, own, fused, statistic, row):
        alone = getattr(own, "weight", None) is not None
        self.on(own if alone else fused, statistic, row, *self.norm_of(not alone))

    def watch(self, i, layer):
        attention, mlp = layer.self_attention, layer.mlp
        heads = self.config.num_attention_heads
        self.on(layer, "layers", i, lambda m, x, y: 1 - F.cosine_similarity(x, y, dim=-1))
        self.norm(layer.input_layernorm, getattr(attention, "linear_qkv", None), "norms", 2 * i)
        self.norm(layer.pre_mlp_layernorm, getattr(mlp, "linear_fc1", None), "norms", 2 * i + 1)
        self.on(attention.linear_proj, "heads", i, lambda m, x, y: x.unflatten(-1, (heads, -1)).norm(dim=-1))
        self.on(attention.linear_proj, "head_channels", i, lambda m, x, y: x)
        for part in ("q", "k"):
            if getattr(getattr(attention, f"{part}_layernorm", None), "weight", None) is not None:
                self.on(getattr(attention, f"{part}_layernorm"), f"{part}_norm", i, _heads_as_positions)
        for part in ("q", "kv"):
            up = getattr(attention, f"linear_{part}_up_proj", None)
            if up is not None:
                self.norm(getattr(attention, f"{part}_layernorm"), up, f"{part}_latent", i)
        if isinstance(mlp, MoELayer):
            self.handles.append(mlp.register_forward_hook(lambda m, args, y: self.mixture(i, m, args[0].flatten(0, 1))))
        else:
            gated = self.config.gated_linear_unit
            self.on(mlp.linear_fc2, "ffn", i, lambda m, x, y: x)
            self.on(mlp.linear_fc1, "ffn_pre_activation", i, lambda m, x, y: _pre_activation(m, y, gated))

    def mixture(self, i, layer, h):
        """A mixture written out: `h` float64 [tokens, H]."""
        chosen = routing64(layer.router, h)
        for expert, mlp in enumerate(layer.experts.local_experts):
            tokens = chosen[:, expert] > 0
            active = _gated(mlp, h[tokens]) * chosen[tokens, expert, None]
            self.put("expert_ffn", i, expert, active)
            self.put("experts", i, expert, (active @ mlp.linear_fc2.weight.t()).norm(dim=-1))
        self.put("shared_expert_ffn", i, None, _gated(layer.shared_experts, h))


def _heads_as_positions(module, x, output):
    return output.transpose(1, 2).flatten(0, 1)  # [S, 1, heads, D] -> [S * heads, 1, D]


def _pre_activation(linear, output, gated):
    return output.chunk(2, -1)[0] if gated else output + linear.bias


def _gated(mlp, h):
    gate, up = (h @ mlp.linear_fc1.weight.t()).chunk(2, -1)
    return F.silu(gate) * up


def routing64(router, h):
    """[tokens, experts]: the router's probability of the chosen experts, else 0."""
    config, logits = router.config, h @ router.weight.double().t()
    if config.moe_router_score_function == "sigmoid":
        scores = logits.sigmoid()
        chosen = (scores + router.expert_bias.double()).topk(config.moe_router_topk).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True) * config.moe_router_topk_scaling_factor
    else:
        top, chosen = logits.topk(config.moe_router_topk)
        weights = top.softmax(-1)
    return torch.zeros_like(logits).scatter(1, chosen, weights)


class Taylor(Kept):
    """Each activation times its gradient; `keep` gets (activation in the graph, what makes values of its gradient)."""

    def __init__(self, model, vocab_size):
        self.vocab_size, self.graph = vocab_size, []
        super().__init__(model)

    def keep(self, statistic, row, expert, pair):
        tensor, values = pair
        tensor.retain_grad()
        self.graph.append((statistic, row, expert, tensor, values))

    def run(self, tokens):
        self.graph.clear()
        logits = self.model(tokens, torch.arange(tokens.shape[1])[None], None)[0, :-1, : self.vocab_size]
        F.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()
        for statistic, row, expert, tensor, values in self.graph:
            found = values(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
            self.put(statistic, row, expert, found.flatten(0, 1) if found.dim() > 2 else found)

    def norm_of(self, fused):
        return (_times,)

    def watch(self, i, layer):
        attention, mlp = layer.self_attention, layer.mlp
        heads = self.config.num_attention_heads
        self.on(layer, "layers", i, lambda m, x, y: (y, lambda g: ((y - x) * g).sum(-1).abs()))
        for row, x in ((2 * i, layer.input_layernorm), (2 * i + 1, layer.pre_mlp_layernorm)):
            self.on(x, "norms", row, _times)  # also where it is the identity: its input is the residual stream
        self.on(attention.linear_proj, "heads", i,
                lambda m, x, y: (x, lambda g: (x * g).unflatten(-1, (heads, -1)).sum(-1)))  # fmt: skip
        if not isinstance(mlp, MoELayer):
            self.on(mlp.linear_fc2, "ffn", i, _times)
            return
        self.on(mlp.shared_experts.linear_fc2, "shared_expert_ffn", i, _times)
        for expert, own in enumerate(mlp.experts.local_experts):
            self.on(own.linear_fc2, "expert_ffn", i, _times, expert)
            self.on(own.linear_fc2, "experts", i, lambda m, x, y: (y, lambda g: (y * g).sum(-1)), expert)


def _times(module, x, output):
    return x, lambda gradient: x * gradient
