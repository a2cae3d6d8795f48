"""Builds NeMo's data module and prints as JSON what it dealt out. Run by test_data_module.py, alone."""

from __future__ import annotations

import json
import os
import sys
from itertools import chain
from pathlib import Path

SEQUENCE, MICRO, WHOLE, STEPS = 16, 1, 4, 5


def dealt(module, dataset, world: int) -> list[list[list[int]]]:
    """Per step and micro batch, rank after rank, the samples that a data-parallel world of that size sees."""
    from nemo.lightning.data import add_megatron_sampler
    from torch.utils.data import DataLoader

    ranks = []
    for rank in range(world):
        loader = add_megatron_sampler(
            DataLoader(dataset),
            MICRO,
            WHOLE,
            dataloader_type=module.dataloader_type,
            rank=rank,
            world_size=world,
        )
        ranks.append([batch["tokens"].tolist() for batch in loader])
    micro = [list(chain(*together)) for together in zip(*ranks, strict=True)]
    each = WHOLE // (MICRO * world)
    return [list(chain(*micro[i : i + each])) for i in range(0, len(micro), each)][:STEPS]


def made(folder: Path, **options):
    from nemo_minitron.hosts.nemo.data_module import data_module

    sizes = {"sequence_length": SEQUENCE, "micro_batch_size": MICRO, "global_batch_size": WHOLE, "seed": 3}
    module = data_module(folder / "train", folder / "test", tokenizer=folder / "tokenizer", **(sizes | options))
    module.build(STEPS, STEPS, 1.0, 1)
    return module


def torn(folder: Path, index: Path) -> dict[str, bool]:
    """Damage to Megatron's files of an index -> whether the next process deals the same samples all the same."""
    straight, found = dealt(made(folder), made(folder)._train_ds, 1), {}
    ways = {
        "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
        "empty": lambda file: os.truncate(file, 0),
        "blank": lambda file: file.write_bytes(file.read_bytes()[:128].ljust(file.stat().st_size, b"\0")),
        "gone": lambda file: file.unlink(),
    }
    for name, damage in ways.items():
        for kind in ("document_index.npy", "sample_index.npy", "shuffle_index.npy", "description.txt", "whole.json"):
            for file in index.glob(f"*-train-{kind}"):
                damage(file)
                module = made(folder)
                found[f"{kind} {name}"] = dealt(module, module._train_ds, 1) == straight
    return found


def context_of(module, folder: Path) -> list[str]:
    """The files of a NeMo context that holds the module; loads it again, as a resumed job would."""
    from nemo.lightning import io

    folder.mkdir()
    module.io_dump(folder, yaml_attrs=[])
    again = io.load(folder, type(module))
    assert again.tokenizer.eos_id == module.tokenizer.eos_id
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def fitted(folder: Path) -> dict:
    """Two steps of NeMo's own training loop on a pico Llama with more rows than tokens."""
    import torch
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.hosts.nemo.data_module import data_module

    seen = []
    config = llm.LlamaConfig(
        num_layers=1, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, num_query_groups=2,
        seq_length=SEQUENCE, vocab_size=448, make_vocab_size_divisible_by=1,
        share_embeddings_and_output_weights=True, params_dtype=torch.float32, bf16=False,
        autocast_dtype=torch.float32,
    )  # fmt: skip
    data = data_module(
        folder / "train", folder / "test", tokenizer=folder / "tokenizer", sequence_length=SEQUENCE,
        micro_batch_size=MICRO, global_batch_size=WHOLE, seed=3,
    )  # fmt: skip
    model = llm.LlamaModel(config, tokenizer=data.tokenizer)
    trainer = nl.Trainer(
        accelerator="cpu", devices=1, max_steps=2, limit_val_batches=1, val_check_interval=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
        use_distributed_sampler=False,
        strategy=nl.MegatronStrategy(ckpt_load_optimizer=False, ckpt_save_optimizer=False, ddp="megatron"),
        plugins=nl.MegatronMixedPrecision(precision="32"), default_root_dir=str(folder),
    )  # fmt: skip
    original = data.dataset_cls.__getitem__
    data.dataset_cls.__getitem__ = lambda self, i: seen.append(i) or original(self, i)
    trainer.fit(model, data)
    data.dataset_cls.__getitem__ = original
    rows = next(p.shape[0] for n, p in model.named_parameters() if "word_embeddings" in n)
    return {"step": trainer.global_step, "seen": seen[: 2 * WHOLE], "rows": rows}


def main() -> None:
    import nemo_minitron.backend as backend

    backend.setup()
    folder = Path(sys.argv[1])
    module = made(folder)
    sample = module._train_ds[0]
    result = {
        "keys": sorted(sample),
        "dtypes": sorted({str(value.dtype) for value in sample.values()}),
        "shift": bool((sample["tokens"][1:] == sample["labels"][:-1]).all()),
        "worlds": {world: dealt(module, module._train_ds, world) for world in (1, 2, 4)},
        "other_seed": dealt(module, made(folder, seed=4)._train_ds, 1),
        "loss_mask": sum(float(s["loss_mask"].sum()) for s in module._train_ds) / len(module._train_ds),
        "tokens": sorted({t for s in module._train_ds for t in s["tokens"].tolist()}),
        "validation": [len(module._validation_ds), len(module._test_ds)],
        "vocabulary": module.tokenizer.vocab_size,
        "index": module.index_mapping_dir,
        "torn": torn(folder, Path(module.index_mapping_dir)),
        "context": context_of(module, folder / "context"),
        "fit": fitted(folder),
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
