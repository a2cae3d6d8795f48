"""Run by ranks.py, once for each world size: every layout of that size, on bare Megatron modules.

Arguments: folder of pico models, JSON list of cases, output file. Rank 0 writes the results of a case.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
from ranks import leave_layout
from workers import load_model, process_group, run_cases

CRITERIA = ["l2,mean", *(",".join(p) for p in itertools.product(("mean", "l2", "var", "max"), repeat=2))]
BOUNDARIES = [[0, 7, 16, 22], [0, 24], [0, 1, 13, 24], [0, 3, 20]]  # of packed rows; some leave a tail
AXES = ("ffn", "ffn_pre_activation", "heads", "head_channels", "norms", "layers", "stream_logs", "mlp_output")


def register_own_estimator():
    """The example of docs/own-estimator.md."""
    from megatron.core.transformer.mlp import MLP

    from nemo_minitron.importance import Estimator, Watch, estimator

    @estimator(MLP)
    class Written(Estimator):
        """Scores embedding channels by what each MLP writes into the residual stream."""

        axis, sharded = "mlp_output", False

        def watch(self, module, layer, architecture):
            return Watch(layer, module.linear_fc2, lambda module, given, output: output[0])


def batches_of(kind, tokens):
    """This data-parallel rank's batches: plain rows, rows with masks dealt unevenly, or packed rows."""
    import torch
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if kind == "plain":
        return [batch[rank::size] for batch in tokens.split(4 * size)]
    if kind == "masked":
        mask = torch.from_numpy(np.load(Path(sys.argv[1]) / "mask.npy"))
        first = [0, 10, 16] if size == 2 else np.linspace(0, 16, size + 1).astype(int)  # ranks get 10 and 6 rows
        mine = slice(first[rank], first[rank + 1])
        return [{"tokens": t, "loss_mask": m} for t, m in zip(tokens[mine].split(4), mask[mine].split(4), strict=True)]
    rows = [{"tokens": tokens[k : k + 1], "cu_seqlens": torch.tensor([b])} for k, b in enumerate(BOUNDARIES)]
    return rows[rank::size]


def run_case(case, folder, out):
    import torch

    from nemo_minitron.importance import estimate, magnitude
    from nemo_minitron.megatron.live import LiveSource
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.folder import HFSource
    from nemo_minitron.sources.tensors import source_digest, whole

    layout = Layout(**case["layout"])
    source = HFSource(folder / case["model"])
    chunks = load_model(folder / case["model"], layout=layout)
    live = LiveSource(chunks, source.architecture)
    result = {
        "differing": [
            name
            for name, shape in source.architecture.shapes().items()
            if not np.array_equal(live.read(name, whole(shape)), source.read(name, whole(shape)))
        ],
        "digest": source_digest(live) == source_digest(source),
        "magnitude": magnitude(live).digest == magnitude(source).digest,
    }
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    logits = _logits(chunks, tokens[:2], source.architecture.vocab_size) if layout.pp * layout.cp == 1 else None
    found = {}
    for kind in case["kinds"]:
        found[kind] = estimate(chunks, batches_of(kind, tokens), criterion=CRITERIA, axes=AXES)
    for mutation, kind in case["mutations"]:
        with mutated(mutation):
            found[mutation] = estimate(chunks, batches_of(kind, tokens), criterion=CRITERIA, axes=AXES)
    leave_layout()
    if torch.distributed.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(result))
        for kind, scores in found.items():
            scores.save(out / f"{case['name']}-{kind}.safetensors")
        if logits is not None:
            np.save(out / f"{case['name']}.npy", logits.numpy())


def mutated(name):
    import mutations

    return mutations.MUTATIONS[name]()


def _logits(chunks, tokens, vocab_size):
    import torch
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        local = chunks[0].eval()(tokens, positions, None)
        return gather_from_tensor_model_parallel_region(local)[..., :vocab_size]


def main():
    with process_group():
        register_own_estimator()
        run_cases(run_case)


if __name__ == "__main__":
    main()
