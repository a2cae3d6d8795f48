"""Model Optimizer 0.37 cuts a Llama folder on a CPU, in a process of its own, for `quality.py`:
`python benchmarks/quality_peer.py MODEL ROWS.npy SIZES.json OUT.json`.

The model is Megatron's local layers, filled from the folder, with torch's RMSNorm, which stands for Transformer
Engine's (its dynamic norm is Model Optimizer's own of LayerNorm, without a bias). ROWS: int64 [rows, length]. SIZES:
Megatron's field names. OUT: what stays of each axis, read off the weights of the model that it cut; the loss of the
uncut model on the first row, which shows that it is the same model; and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 4  # rows


def register_norm() -> None:
    """Lets Model Optimizer cut torch's RMSNorm, as it does Transformer Engine's."""
    import torch
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry

    class DynamicRMSNorm(_DynamicLayerNorm):
        def _setup(self) -> None:
            self.bias = None
            super()._setup()

    DMRegistry.register({torch.nn.RMSNorm: "nn.RMSNorm"})(DynamicRMSNorm)


def gather_numbers() -> None:
    """Gloo gathers tensors of equal ranks alone; Model Optimizer gathers the number of layers, which has no dimension,
    into a vector, as NCCL allows. Here is one process, so the result has the number's size."""
    import torch

    gather = torch.distributed.all_gather_into_tensor

    def of_one_process(output: Any, part: Any, **more: Any) -> Any:
        return gather(output, part.reshape(output.shape), **more)

    torch.distributed.all_gather_into_tensor = of_one_process


def build(source: Any) -> Any:
    """The folder's model, fp32: Megatron's local layers with torch's RMSNorm. For Llamas without biases."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    a = source.architecture
    config = TransformerConfig(
        num_layers=a.num_layers, hidden_size=a.hidden_size, ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads, num_query_groups=a.num_query_groups, kv_channels=a.head_dim,
        normalization="RMSNorm", layernorm_epsilon=source.config["rms_norm_eps"], add_bias_linear=False,
        gated_linear_unit=True, bias_activation_fusion=False, activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0, attention_dropout=0.0, persist_layer_norm=False,
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(layer.submodules, norm, WrappedTorchNorm)
    spec = TransformerBlockSubmodules([layer] * a.num_layers, layer_norm=WrappedTorchNorm)
    model = GPTModel(
        config, spec, a.vocab_size, 8192, position_embedding_type="rope", rotary_base=source.config["rope_theta"],
        share_embeddings_and_output_weights=a.tied_embeddings,
    )  # fmt: skip
    with torch.no_grad():
        _fill(model, source)
    return model.eval()


def _fill(model: Any, source: Any) -> None:
    import torch

    from nemo_minitron.artifacts.dtypes import as_numbers
    from nemo_minitron.sources.tensors import whole

    a, shapes = source.architecture, source.architecture.shapes()

    def tensor(name: str) -> Any:
        return torch.from_numpy(as_numbers(source.read(name, whole(shapes[name])), source.dtype(name)))

    model.embedding.word_embeddings.weight.copy_(tensor("embedding.weight"))
    model.decoder.final_layernorm.weight.copy_(tensor("final_norm.weight"))
    if not a.tied_embeddings:
        model.output_layer.weight.copy_(tensor("head.weight"))
    for number, layer in enumerate(model.decoder.layers):
        part = {n: tensor(f"layers.{number}.{n}.weight") for n in ("q", "k", "v", "o", "gate", "up", "down")}
        groups = [part[n].view(a.num_query_groups, -1, a.head_dim, a.hidden_size) for n in ("q", "k", "v")]
        layer.self_attention.linear_qkv.weight.copy_(torch.cat(groups, 1).reshape(-1, a.hidden_size))
        layer.self_attention.linear_proj.weight.copy_(part["o"])
        layer.mlp.linear_fc1.weight.copy_(torch.cat([part["gate"], part["up"]]))
        layer.mlp.linear_fc2.weight.copy_(part["down"])
        layer.input_layernorm.weight.copy_(tensor(f"layers.{number}.input_norm.weight"))
        layer.pre_mlp_layernorm.weight.copy_(tensor(f"layers.{number}.pre_mlp_norm.weight"))


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """The weights by which units are recognised: embedding [H, vocabulary] and, by layer, norm [H], down [F, H] and
    o [heads x head_dim, H]."""

    def numbers(tensors: list[Any]) -> np.ndarray:
        return np.stack([tensor.detach().numpy().T for tensor in tensors])

    layers = model.decoder.layers
    return {
        "embedding": model.embedding.word_embeddings.weight.detach().numpy().T.copy(),
        "norm": numbers([layer.pre_mlp_layernorm.weight for layer in layers]),
        "down": numbers([layer.mlp.linear_fc2.weight for layer in layers]),
        "o": numbers([layer.self_attention.linear_proj.weight for layer in layers]),
    }


def places(rows: np.ndarray, among: np.ndarray) -> list[int]:
    """Where each of `rows` stands among the rows of `among`, by their values. All of these must differ."""
    known = {row.tobytes(): place for place, row in enumerate(np.ascontiguousarray(among))}
    assert len(known) == len(among), "two units have the same weights"
    return [known[row.tobytes()] for row in np.ascontiguousarray(rows)]


def stays(teacher: dict[str, np.ndarray], student: dict[str, np.ndarray], head_dim: int) -> dict[str, Any]:
    """{axis: what stays}, in the form of a plan, sorted. Model Optimizer orders channels and neurons by importance."""
    channels = places(student["embedding"], teacher["embedding"])
    layers = places(student["norm"], teacher["norm"][:, channels])
    keep: dict[str, Any] = {"hidden": sorted(channels), "layers": layers, "ffn": {}, "heads": {}}
    for number, down, o in zip(layers, student["down"], student["o"], strict=True):
        keep["ffn"][number] = sorted(places(down, teacher["down"][number][:, channels]))
        keep["heads"][number] = sorted({p // head_dim for p in places(o, teacher["o"][number][:, channels])})
    return keep


def loss(model: Any, row: Any) -> float:
    """Mean cross entropy of the next token on int64 [S]."""
    import torch

    with torch.no_grad():
        logits = model(row[None], torch.arange(len(row))[None], None)[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), row[1:]).item()


def main() -> None:
    started = time.perf_counter()
    import nemo_minitron.backend as backend

    backend.setup()
    import peer
    import torch

    from nemo_minitron.sources.open import open_source

    torch.set_num_threads(1)
    folder, rows, sizes, out = sys.argv[1:]
    source, tokens = open_source(folder), torch.from_numpy(np.load(rows))
    peer.one_process()
    register_norm()
    gather_numbers()
    model = build(source)
    before, first = weights_of(model), loss(model, tokens[0])
    ready = time.perf_counter()
    student = peer.prune(model, tokens.split(BATCH), **json.loads(Path(sizes).read_text()))
    done = time.perf_counter()
    keep = stays(before, weights_of(student), source.architecture.head_dim)
    seconds = {"load": round(ready - started, 1), "score and cut": round(done - ready, 1)}
    Path(out).write_text(json.dumps({"keep": keep, "loss of the first row": first, "seconds": seconds}))


if __name__ == "__main__":
    main()
