"""Run under torchrun with two processes: every family's model in NeMo's own class, in one copy and split over both.

Arguments: folder of models, output folder. Rank 0 writes one result a case.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
from ranks import leave_layout

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/

from workers import process_group

IMPORTERS = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3",
             "qwen3_moe": "Qwen3", "nemotron": "Nemotron", "phi3": "Phi3"}  # fmt: skip
LAYOUTS = {"whole": {"dp": 2}, "split": {"tp": 2, "sp": True}}


def differing(source, expected):
    """Names of the tensors that two sources do not agree on, bit by bit."""
    from nemo_minitron.sources.tensors import whole

    return [
        name
        for name, shape in expected.architecture.shapes().items()
        if not np.array_equal(source.read(name, whole(shape)), expected.read(name, whole(shape)))
    ]


def misread(chunks, expected):
    """The fields of the live model's Architecture that are not the folder's: its vocabulary is without padding."""
    from nemo_minitron.importance.forward import architecture_of

    live, folders = architecture_of(chunks[0]).as_dict(), expected.architecture.as_dict()
    return [name for name in folders if live[name] != folders[name]]


def run_case(name, kind, folder, out):
    """The teacher and its student in this layout: bits, logits, and checkpoints where they are split."""
    from checkpoints import save_checkpoint

    from nemo_minitron.artifacts import PrunePlan
    from nemo_minitron.megatron.live import LiveSource
    from nemo_minitron.nemo import load_model
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.folder import HFSource

    layout = Layout(**LAYOUTS[kind])
    plan, result, found = PrunePlan.load(folder / f"{name}-plan.json"), {}, {}
    for model, cut in (("teacher", None), ("student", plan)):
        expected = HFSource(folder / f"{name}-{model}")
        chunks = load_model(folder / f"{name}-teacher", cut, layout=layout)
        result[model] = differing(LiveSource(chunks, expected.architecture), expected)
        result[model] += misread(chunks, expected)
        found[model] = logits(chunks, folder)
        if kind == "split":
            save_checkpoint(chunks, out / f"{name}-{model}", expected.config)
            result["context"] = context(out / f"{name}-{model}" / "context")
    write(out / f"{name}-{kind}", result, found)


def run_importer(family, folder, out):
    """NeMo's importer of a family: the fields of its config that are not ours, and the tensors that are not the
    folder's. Where it leaves the vocabulary to a tokenizer, the model is built with the folder's."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.families import family_of
    from nemo_minitron.hosts.nemo.models import build, nemo_config
    from nemo_minitron.megatron.groups import start
    from nemo_minitron.megatron.live import LiveSource
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.folder import HFSource

    layout, expected = Layout(**LAYOUTS["whole"]), HFSource(folder / f"{family}-import")
    start(layout)
    file = {"phi3": "phi3mini", "qwen3_moe": "qwen3"}.get(family, family)
    module = importlib.import_module(f"nemo.collections.llm.gpt.model.{file}")
    importer = getattr(module, f"HF{IMPORTERS[family]}Importer")(str(expected.folder))
    importer.trust_remote_code = False
    theirs, ours = importer.config, nemo_config(expected.config)
    _, fields = family_of(expected.config).nemo_config(expected.config)
    fields.pop("make_vocab_size_divisible_by")  # pads nothing where the vocabulary is given
    result = {"config": sorted(n for n in fields if getattr(theirs, n) != getattr(ours, n))}
    theirs.vocab_size = ours.vocab_size
    chunks = build(theirs, layout)
    importer.convert_state(AutoModelForCausalLM.from_pretrained(expected.folder), chunks[0])
    result["tensors"] = differing(LiveSource(chunks, expected.architecture), expected)
    write(out / f"{family}-import", result, {})


def context(folder):
    """Of the config that NeMo itself builds from a checkpoint's context: activation, hidden size, head_dim, tied."""
    from nemo.lightning import io

    config = io.load_context(folder, subpath="model").config
    tied = config.share_embeddings_and_output_weights
    return [config.activation_func.__name__, config.hidden_size, config.kv_channels, tied]


def logits(chunks, folder):
    """fp32 [batch, sequence, vocabulary]; each data-parallel rank runs the whole batch."""
    import torch
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        local = chunks[0].eval()(tokens, positions, None)
        return gather_from_tensor_model_parallel_region(local)[..., :509].numpy()


def write(path, result, found):
    import torch

    leave_layout()
    if torch.distributed.get_rank() == 0:
        path.with_suffix(".json").write_text(json.dumps(result))
        np.savez(path.with_suffix(".npz"), **found)


def main():
    from contract import NEMO_NAMES

    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    with process_group():
        for kind in LAYOUTS:
            for name in NEMO_NAMES:
                run_case(name, kind, folder, out)
        for family in IMPORTERS:
            run_importer(family, folder, out)


if __name__ == "__main__":
    main()
