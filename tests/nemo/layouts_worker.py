"""Run under torchrun, once for a world size: every layout of that size, on bare Megatron modules.

Arguments: folder of pico models, JSON list of cases, output file. Rank 0 writes one result a case.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np


def register_own_estimator():
    """The README's example of a user's own estimator."""
    from megatron.core.transformer.mlp import MLP

    from nemo_minitron.importance import Estimator, Watch, estimator

    @estimator(MLP)
    class Written(Estimator):
        """Scores embedding channels by what each MLP writes into the residual stream."""

        axis, sharded = "mlp_output", False

        def watch(self, module, layer, architecture):
            return Watch(layer, module.linear_fc2, lambda module, given, output: output[0])


def run_case(case, folder):
    import torch
    from megatron.core import parallel_state

    from nemo_minitron.importance import estimate
    from nemo_minitron.job.layout import Layout
    from nemo_minitron.nemo import load_model
    from nemo_minitron.nemo.live import LiveSource
    from nemo_minitron.pruning.folder import HFSource
    from nemo_minitron.pruning.tensors import source_digest, whole

    layout = Layout(**case["layout"])
    source = HFSource(folder / case["model"])
    chunks = load_model(folder / case["model"], layout=layout)
    live = LiveSource(chunks, source.architecture)
    differing = [
        name
        for name, shape in source.architecture.shapes().items()
        if not np.array_equal(live.read(name, whole(shape)), source.read(name, whole(shape)))
    ]
    digest = source_digest(live) == source_digest(source)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [batch[rank::size] for batch in tokens.split(4)]
    scores = estimate(chunks, batches)
    scores.tensors |= estimate(chunks, batches, axes=("mlp_output",)).tensors
    logits = _logits(chunks, tokens[:2], source.architecture.vocab_size) if layout.pp == 1 else None
    parallel_state.destroy_model_parallel()
    return {"differing": differing, "digest": digest}, scores, logits


def _logits(chunks, tokens, vocab_size):
    import torch
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        local = chunks[0].eval()(tokens, positions, None)
        return gather_from_tensor_model_parallel_region(local)[..., :vocab_size]


def main():
    folder, cases, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    register_own_estimator()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    for case in cases:
        result, scores, logits = run_case(case, folder)
        if torch.distributed.get_rank() == 0:
            (out / f"{case['name']}.json").write_text(json.dumps(result))
            scores.save(out / f"{case['name']}.safetensors")
            if logits is not None:
                np.save(out / f"{case['name']}.npy", logits.numpy())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
