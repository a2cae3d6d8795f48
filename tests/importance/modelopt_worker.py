"""Run in a process of its own, since Model Optimizer patches torch and Megatron when it is imported.

Argument: output file, JSON: {case: {"kept": {axis: {who: per layer what stays}}, "scores": {who: {axis: array}}}}.
Both see the same models and batches; what Model Optimizer keeps is read off the weights of the models it pruned.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

GROUPS, HEADS, WIDTH = 4, 8, 8
SIZES = {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": HEADS, "kv_channels": WIDTH}
SIZES |= {"num_query_groups": GROUPS, "vocab_size": 509, "sequence_length": 32}
ROWS = (3, 2, 4)  # batches of several sizes: an L2 over samples, not over batches
KEEP = {  # ours and theirs; they want both numbers when heads or groups go
    "ffn": ({"ffn": 60}, {"ffn_hidden_size": 60}),
    "hidden": ({"hidden": 32}, {"hidden_size": 32}),
    "heads": ({"heads": 4}, {"num_attention_heads": 4, "num_query_groups": 4}),
    "query_groups": ({"query_groups": 2}, {"num_attention_heads": 4, "num_query_groups": 2}),
}


def dead(model):
    """Exact ties: 50 dead neurons of 96 in each layer, and 20 hidden channels of 48 that its norms mute."""
    for layer in model.decoder.layers:
        layer.mlp.linear_fc1.weight[5:55] = 0  # the gate's rows: silu(0) * up is 0
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            norm.weight[7:27] = 0
            norm.bias[7:27] = 0


def loud(model):
    """Query group 2 of 4 writes ten times as much: its values, the last of a group's four parts of linear_qkv."""
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.weight.view(GROUPS, 4, WIDTH, -1)[2, -1] *= 10


CASES = {"seed 0": (0, None), "seed 1": (1, None), "seed 2": (2, None), "dead": (3, dead), "loud": (4, loud)}


def build(case):
    import peer
    import torch

    seed, change = CASES[case]
    model = peer.local_model(**SIZES, seed=seed)
    if change:
        with torch.no_grad():
            change(model)
    return model


def batches_of(case):
    import torch

    generator = torch.Generator().manual_seed(CASES[case][0])
    return [torch.randint(SIZES["vocab_size"], (rows, 32), generator=generator) for rows in ROWS]


def run(case):
    import peer

    from nemo_minitron.importance import estimate

    model, batches = build(case), batches_of(case)
    ours = {norms: estimate(model, batches, norms=norms) for norms in ("layers", "all")}
    channels = estimate(model, batches, axes=("head_channels",))  # heads as Model Optimizer scores them
    by_batch = [estimate(model, [batch], axes=("layers",))["layers"].tolist() for batch in batches]
    who = {"ours": ours["layers"], "all norms": ours["all"], "channels": channels}
    kept = {axis: _kept(axis, model, peer.prune(build(case), batches, **KEEP[axis][1]), who) for axis in KEEP}
    heads = by_hand(model, batches)
    converted = peer.convert(model)
    peer.forward(converted, batches)
    scores = {name: {axis: scores[axis].tolist() for axis in scores.tensors} for name, scores in who.items()}
    scores["modelopt"] = {axis: a.tolist() for axis, a in peer.scores(converted, len(batches)).items()}
    return {"kept": kept, "scores": {**scores, "by hand": heads, "by batch": by_batch}}


def _kept(axis, teacher, student, who):
    from nemo_minitron.search import plan

    kept = {"modelopt": stays(axis, teacher, student)}
    for name, scores in who.items():
        if axis in scores.tensors:
            chosen = plan(scores, keep=KEEP[axis][0]).keep[axis]
            kept[name] = [chosen[n] for n in sorted(chosen)] if isinstance(chosen, dict) else [chosen]
    return kept


def stays(axis, teacher, student):
    """What is left in a pruned student, by layer, by the values of its weights alone."""
    import peer

    if axis == "hidden":
        return [peer.kept(teacher.embedding.word_embeddings.weight.T, student.embedding.word_embeddings.weight.T)]
    unit = {"ffn": 1, "heads": WIDTH, "query_groups": HEADS // GROUPS * WIDTH}[axis]
    found = []
    for layers in zip(teacher.decoder.layers, student.decoder.layers, strict=True):
        linear = [layer.mlp.linear_fc2 if axis == "ffn" else layer.self_attention.linear_proj for layer in layers]
        rows = peer.kept(linear[0].weight.T, linear[1].weight.T)
        found.append(sorted({row // unit for row in rows}))
    return found


def by_hand(model, batches):
    """From the inputs of linear_proj, [S, B, heads x width], in float64: mean |a| over the sequence, L2 over samples,
    of each channel and of each head's norm; [layers, ...]."""
    import peer
    import torch

    seen = {layer.layer_number: [] for layer in model.decoder.layers}
    hooks = [
        layer.self_attention.linear_proj.register_forward_hook(
            lambda _, given, output, number=layer.layer_number: seen[number].append(given[0].double())
        )
        for layer in model.decoder.layers
    ]
    peer.forward(model, batches)
    for hook in hooks:
        hook.remove()
    found = {"channels": [], "heads": []}
    for inputs in seen.values():
        heads = [x.unflatten(-1, (HEADS, WIDTH)).norm(dim=-1) for x in inputs]
        for name, values in (("channels", inputs), ("heads", heads)):
            found[name].append(torch.cat([x.abs().mean(0) for x in values]).norm(dim=0).tolist())
    return found


def main():
    import nemo_minitron.backend as backend

    backend.setup()
    import peer
    import torch

    torch.set_num_threads(1)
    peer.one_process()
    Path(sys.argv[1]).write_text(json.dumps({case: run(case) for case in CASES}))


if __name__ == "__main__":
    main()
