"""Distils a pruned student in your own NeMo script: torchrun examples/nemo_distill.py STUDENT TEACHER CORPUS OUT

STUDENT and TEACHER are NeMo checkpoints; the teacher may also be a Hugging Face folder. CORPUS is the prefix of
Megatron's .bin/.idx files. OUT/checkpoints gets plain NeMo checkpoints of the student, which do not need nemo_minitron.
"""

import sys

STEPS = 4


def main(student: str, teacher: str, corpus: str, out: str) -> None:
    import nemo_minitron.backend as backend

    backend.setup()  # does nothing if CUDA and Transformer Engine are there
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.nemo import Distillation

    model = nl.io.load_context(f"{student}/context", subpath="model")
    data = llm.PreTrainingDataModule(
        paths={"train": [corpus], "validation": [corpus], "test": [corpus]}, split=None, seq_length=32,
        micro_batch_size=2, global_batch_size=2, num_workers=0, tokenizer=model.tokenizer,
    )  # fmt: skip
    trainer = nl.Trainer(
        accelerator="auto", devices=1, max_steps=STEPS, limit_val_batches=0, log_every_n_steps=1,
        strategy=nl.MegatronStrategy(), plugins=nl.MegatronMixedPrecision(precision="32"),
        callbacks=[Distillation(teacher, "forward_kl", precision="fp32")],
    )  # fmt: skip
    checkpoints = nl.ModelCheckpoint(save_last=True, monitor=None, save_top_k=0, every_n_train_steps=STEPS)
    llm.train(
        model, data, trainer, log=nl.NeMoLogger(explicit_log_dir=out, ckpt=checkpoints),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=student)),
        optim=nl.MegatronOptimizerModule(OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)),
    )  # fmt: skip


if __name__ == "__main__":  # saving a checkpoint starts a helper that imports this file again
    main(*sys.argv[1:])
