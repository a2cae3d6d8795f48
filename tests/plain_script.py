"""What a NeMo user does with a student afterwards, run by tests/cli/test_compress.py: of this package
`backend.setup()` alone; on a GPU with Transformer Engine not even that (`gpu`), run by tests/gpu.

Arguments: a distilled checkpoint; a folder with `questions`, where it is exported to `exported`, finetuned for two
steps in `finetuned`, and exported again to `finetuned-hf`; cpu or gpu. Prints the modules of this package in use.
"""

import json
import sys
from pathlib import Path


def main(checkpoint: Path, folder: Path, accelerator: str) -> None:
    if accelerator == "cpu":
        import nemo_minitron.backend as backend

        backend.setup()
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm

    llm.export_ckpt(checkpoint, "hf", output_path=folder / "exported")
    model = nl.io.load_context(checkpoint / "context", subpath="model")
    data = llm.FineTuningDataModule(
        folder / "questions", seq_length=32, micro_batch_size=1, global_batch_size=2, tokenizer=model.tokenizer,
        num_workers=0,
    )  # fmt: skip
    trainer = nl.Trainer(
        accelerator=accelerator, devices=1, max_steps=2, limit_val_batches=0, enable_progress_bar=False,
        strategy=nl.MegatronStrategy(), plugins=nl.MegatronMixedPrecision(precision="32"),
    )  # fmt: skip
    saved = nl.ModelCheckpoint(save_last=True, monitor=None, save_top_k=0)
    adam = OptimizerConfig(optimizer="adam", lr=1e-4, weight_decay=0.0, use_distributed_optimizer=True)
    llm.finetune(
        model, data, trainer, log=nl.NeMoLogger(explicit_log_dir=str(folder / "finetuned"), ckpt=saved),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(checkpoint))),
        optim=nl.MegatronOptimizerModule(adam),
    )  # fmt: skip
    (last,) = (folder / "finetuned" / "checkpoints").glob("*-last")
    llm.export_ckpt(last, "hf", output_path=folder / "finetuned-hf")
    print("RESULT" + json.dumps([name for name in sys.modules if name.startswith("nemo_minitron")]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
