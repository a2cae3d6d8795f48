"""Prunes a model in your own NeMo script, in any layout: torchrun examples/nemo_prune.py CHECKPOINT CORPUS OUT

CHECKPOINT is a NeMo checkpoint. CORPUS is the prefix of Megatron's .bin/.idx files. The script leaves
OUT/scores.safetensors, OUT/plan.json and OUT/student, a NeMo checkpoint of the model's own class. Edit sizes and layout
here.
"""

import sys

KEEP = {"ffn": 64, "hidden": 40, "layers": 5}  # axis -> the size that stays


def main(checkpoint: str, corpus: str, out: str) -> None:
    import nemo_minitron.backend as backend

    backend.setup()  # does nothing if CUDA and Transformer Engine are there
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.nemo import Importance, Pruning

    model = nl.io.load_context(f"{checkpoint}/context", subpath="model")
    data = llm.PreTrainingDataModule(
        paths={"train": [corpus], "validation": [corpus], "test": [corpus]}, split=None, seq_length=32,
        micro_batch_size=2, global_batch_size=2, num_workers=0, tokenizer=model.tokenizer,
    )  # fmt: skip
    trainer = nl.Trainer(
        accelerator="auto", devices=1, limit_val_batches=4, max_steps=1, logger=False, enable_checkpointing=False,
        strategy=nl.MegatronStrategy(), plugins=nl.MegatronMixedPrecision(precision="32"),
        callbacks=[Importance(f"{out}/all.safetensors", criterion=["l2,mean", "var,mean"]), Pruning(out, KEEP)],
    )  # fmt: skip
    nl.AutoResume(restore_config=nl.RestoreConfig(path=checkpoint)).setup(trainer, model)
    trainer.validate(model, data)


if __name__ == "__main__":  # saving a checkpoint starts a helper that imports this file again
    main(*sys.argv[1:])
