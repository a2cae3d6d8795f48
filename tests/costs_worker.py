"""Run under torchrun: what bare Megatron holds on each rank in each layout, beside what `costs` says.

Arguments: JSON list of cases, output folder. Rank r writes `CASE-r.json`.
"""

import json
import sys
from pathlib import Path

from workers import process_group


def kept_bytes(model, *inputs):
    """Bytes that autograd keeps of a forward pass, each storage once, without parameters."""
    import torch

    kept, parameters = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    del output  # so long nothing kept was freed, and no place was taken twice
    return sum(size for place, size in kept.items() if place not in parameters)


def run_case(case):
    import torch
    from bare_models import build, start, tokens
    from megatron.core import parallel_state

    from nemo_minitron.costs import activations, parameters_by_stage
    from nemo_minitron.importance.forward import architecture_of
    from nemo_minitron.job import Layout

    layout = Layout(**case["layout"])
    start(layout.tp, layout.pp, layout.vp, layout.cp, layout.ep, layout.etp or None)
    chunks = build(case["kind"], tied=case.get("tied", False), sequence_parallel=layout.sp)
    architecture = architecture_of(chunks[0])
    stage = parallel_state.get_pipeline_model_parallel_rank()
    result = {
        "held": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
        "counted": sum(parameters_by_stage(architecture, layout)[stage]),
    }
    if layout.pp == 1:
        ids = tokens(2)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        result["kept"] = kept_bytes(chunks[0], ids, positions, None)
        (result["estimated"],) = activations(
            architecture, layout, batch=2, context=ids.shape[1], precision="fp32", logits=0
        )
    return result


def main():
    import torch

    cases, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    with process_group():
        for case in cases:
            result = run_case(case)
            (out / f"{case['name']}-{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
