"""Run alone: rank 0 of each large recipe's layout as Megatron builds it, without memory, beside what `costs` says.

Argument: JSON of recipe -> [[layout, Architecture], ...]; prints as JSON recipe -> [[held, counted], ...]. The process
group is torch's fake one, which stands for all ranks of the layout; tensors are its fake ones, which are shapes alone.
"""

import contextlib
import json
import sys
from types import SimpleNamespace


def parameters_of_rank(architecture, layout):
    """Parameters that Megatron's GPTModel has on this rank, or its MambaModel."""
    import torch
    from bare_models import KINDS
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.mamba import MambaModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.ssm import mamba_block, mamba_mixer
    from megatron.core.transformer import TransformerConfig
    from torch._subclasses.fake_tensor import FakeTensorMode

    from nemo_minitron import hybrid
    from nemo_minitron.families.base import nemo_sizes

    sizes = nemo_sizes(architecture)
    del sizes["make_vocab_size_divisible_by"]
    vocabulary, tied = sizes.pop("vocab_size"), sizes.pop("share_embeddings_and_output_weights")
    kind = KINDS["llama" if architecture.gated_mlp else "nemotron"]
    if architecture.hybrid_pattern:
        sizes["is_hybrid_model"], kind = True, KINDS["hybrid"]
        sizes |= {name: getattr(architecture, name) for name in hybrid.SIZES}
        kind = {name: value for name, value in kind.items() if name not in sizes}
    config = TransformerConfig(
        **sizes, **kind | {"add_bias_linear": False, "add_qkv_bias": False}, qk_layernorm=architecture.qk_norm,
        tensor_model_parallel_size=layout.tp, expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp, sequence_parallel=layout.sp, perform_initialization=False,
        params_dtype=torch.bfloat16, bf16=True,
    )  # fmt: skip
    for module in (mamba_block, mamba_mixer):  # the generator's states are no shapes
        module.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=contextlib.nullcontext)
    with FakeTensorMode():
        model = MambaModel(
            config, mamba_stack_spec, vocabulary, 8192, hybrid_override_pattern=architecture.hybrid_pattern,
            share_embeddings_and_output_weights=tied,
        ) if architecture.hybrid_pattern else GPTModel(
            config, get_gpt_decoder_block_spec(config, use_transformer_engine=True), vocabulary, 8192,
            position_embedding_type="rope", share_embeddings_and_output_weights=tied,
        )  # fmt: skip
    return sum(parameter.numel() for parameter in model.parameters())


def main():
    import nemo_minitron.backend as backend

    backend.setup()
    import torch
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.costs import parameters_by_stage
    from nemo_minitron.job import Layout

    found = {}
    for name, models in json.loads(sys.argv[1]).items():
        layout = Layout(**models[0][0])
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.processes)
        experts = {"expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": layout.expert_tp}
        parallel_state.initialize_model_parallel(layout.tp, create_gloo_process_groups=False, **experts)
        found[name] = []
        for _, sizes in models:
            architecture = Architecture.from_dict(sizes)
            (counted,) = parameters_by_stage(architecture, layout)
            found[name].append([parameters_of_rank(architecture, layout), sum(counted)])
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
