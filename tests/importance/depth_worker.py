"""Run by ranks.py, once for each world size: the depth criteria in every layout of that size, on bare Megatron.

Arguments: folder of pico models, JSON list of cases, output folder. Rank 0 writes one JSON file a case.
"""

import dataclasses
import json

import numpy as np
from ranks import leave_layout
from workers import process_group, run_cases

COUNT = 3  # layers that go one by one
SIZES = (1, 2, 4)


def tokenize(text):
    """A toy's: a token a character, but that two letters 'e' in a row are one token."""
    return [3 + ord(c) * 7 % 500 for c in text.replace("ee", "\x01")]


def build(architecture, tp=1, pp=1, vp=1, cp=1, sp=False, first_stage=None):
    """This rank's chunks of a bare Megatron GPTModel, not yet filled."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig

    from nemo_minitron.sources.mapping import padded_vocab

    parallel_state.initialize_model_parallel(tp, pp, vp if vp > 1 else None, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    a = architecture
    config = TransformerConfig(
        num_layers=a.num_layers, hidden_size=a.hidden_size, ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads, num_query_groups=a.num_query_groups, kv_channels=a.head_dim,
        normalization="RMSNorm", layernorm_epsilon=3e-5, gated_linear_unit=True, add_bias_linear=False,
        activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None, sequence_parallel=sp,
        num_layers_in_first_pipeline_stage=first_stage, pipeline_dtype=torch.float32,
    )  # fmt: skip
    return [
        GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
            vocab_size=padded_vocab(a.vocab_size, tp),
            max_sequence_length=256,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            position_embedding_type="rope",
            rotary_base=5000,
            share_embeddings_and_output_weights=a.tied_embeddings,
            vp_stage=stage,
        )
        for stage in range(vp)
    ]


def own_batches(folder):
    """This data-parallel rank's rows of each batch; the masks leave the ranks unequal numbers of tokens."""
    import torch
    from megatron.core import parallel_state

    tokens, mask = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("tokens", "mask"))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    pairs = zip(tokens.split(4), mask.split(4), strict=True)
    return [{"tokens": t[rank::size], "loss_mask": m[rank::size]} for t, m in pairs]


class Counted:
    """Forward passes of layers and of the output head, while open."""

    def __init__(self, chunks):
        self.layers = self.heads = 0
        self._chunks = chunks

    def __enter__(self):
        def layer(*_):
            self.layers += 1

        def head(*_):
            self.heads += 1

        modules = [(m, layer) for chunk in self._chunks for m in chunk.decoder.layers]
        modules += [(chunk.output_layer, head) for chunk in self._chunks if chunk.post_process]
        self._handles = [module.register_forward_hook(hook) for module, hook in modules]
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def state_of(chunks):
    """What a scan must leave as it was."""
    return [
        (id(c.decoder.layers), [id(m) for m in c.modules()], list(c.decoder._modules), c.training,
         c.decoder.input_tensor is None)
        for c in chunks
    ]  # fmt: skip


def breaks(chunks, batches, vocab_size):
    """An error in the middle of a scan, in the last layer's second pass; the model must be whole again."""
    from nemo_minitron.importance.depth import depth_scan

    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("a hook failed")

    handle = chunks[-1].decoder.layers[-1].register_forward_hook(fail)
    try:
        depth_scan(chunks, batches, vocab_size=vocab_size)
    except RuntimeError as error:
        return str(error)
    finally:
        handle.remove()
    return None


def counts_of(chunks, batches, vocab_size):
    from nemo_minitron.importance.depth import depth_scan, iterative_removal

    found = {}
    for name, run in {
        "singles": lambda: depth_scan(chunks, batches[:1], vocab_size=vocab_size),
        "sizes": lambda: depth_scan(chunks, batches[:1], SIZES, vocab_size=vocab_size),
        "round": lambda: iterative_removal(chunks, batches[:1], 2, "round", vocab_size=vocab_size),
    }.items():
        with Counted(chunks) as counted:
            run()
        found[name] = [counted.layers, counted.heads]
    return found


def run_case(case, folder):
    import torch

    from nemo_minitron.importance.depth import depth_scan, iterative_removal, multiple_choice, read_items
    from nemo_minitron.megatron.live import fill
    from nemo_minitron.sources.folder import HFSource

    source = HFSource(folder / case["model"])
    layout = {k: v for k, v in case["layout"].items() if k != "dp"}
    chunks, vocab = build(source.architecture, **layout), source.architecture.vocab_size
    fill(chunks, source)
    batches, items, before = own_batches(folder), read_items(folder / "items.jsonl"), state_of(chunks)
    result = {
        "loss": to_rows(depth_scan(chunks, batches, SIZES, vocab_size=vocab)),
        "perplexity": to_rows(depth_scan(chunks, batches, metric="perplexity", vocab_size=vocab)),
    }
    for against in ("source", "round"):
        removal = iterative_removal(chunks, batches, COUNT, against, vocab_size=vocab)
        result[against] = dataclasses.asdict(removal) | {"depth": to_rows(removal.depth)}
    for name, options in {"choices": {}, "by_length": {"by_length": True}}.items():
        accuracy = multiple_choice(chunks, items, tokenize, (1, 2), batch_size=7, vocab_size=vocab, **options)
        result[name] = to_rows(accuracy.accuracy)
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, result)
    result["agreed"] = all(other == result for other in everyone)
    if case["world"] == 1:
        result["counts"] = counts_of(chunks, batches, vocab)
        result["error"] = breaks(chunks, batches, vocab)
    result["restored"] = state_of(chunks) == before
    leave_layout()
    return result


def to_rows(depth):
    return [[*block, value] for block, value in depth.items()]


def write_case(case, folder, out):
    import torch

    result = run_case(case, folder)
    if torch.distributed.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(result))


def main():
    with process_group():
        run_cases(write_case)


if __name__ == "__main__":
    main()
