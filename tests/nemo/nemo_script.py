"""A NeMo user's own script, run by test_nemo_script.py in one process: import, validate with Pruning, export.

Arguments: folder with `pico` (a Hugging Face folder with a tokenizer) and `corpus.jsonl`. Prints JSON.
"""

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    import nemo_minitron.backend as backend

    backend.setup()
    import torch
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.nemo import Importance, Pruning, register
    from nemo_minitron.nemo.data import build, data_module, load_tokenizer

    teacher = folder / "nemo-teacher"
    llm.import_ckpt(llm.LlamaModel(llm.Llama2Config7B()), f"hf://{folder / 'pico'}", output_path=teacher)
    corpus = build(folder / "corpus.jsonl", load_tokenizer(folder / "pico"), folder / "corpus").prefix
    data = data_module(
        corpus, corpus, tokenizer=str(folder / "pico"), sequence_length=32, micro_batch_size=2, global_batch_size=2
    )
    importance = Importance(str(folder / "scores.safetensors"))
    pruning = Pruning(str(folder / "pruned"), {"ffn": 64, "hidden": 40, "layers": 5}, teacher=str(teacher))
    from_live = Pruning(str(folder / "pruned-live"), {"ffn": 64, "hidden": 40, "layers": 5})
    losses = []
    for callbacks in ([], [importance, pruning, from_live]):
        model = nl.io.load_context(teacher / "context", subpath="model")
        trainer = nl.Trainer(
            accelerator="cpu", devices=1, max_steps=1, limit_val_batches=4, logger=False, enable_checkpointing=False,
            strategy=nl.MegatronStrategy(), plugins=nl.MegatronMixedPrecision(precision="32"), callbacks=callbacks,
            enable_progress_bar=False,
        )  # fmt: skip
        nl.AutoResume(restore_config=nl.RestoreConfig(path=str(teacher))).setup(trainer, model)
        losses.append(trainer.validate(model, data, verbose=False)[0]["val_loss"])
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
    llm.export_ckpt(folder / "pruned" / "student", "hf", output_path=folder / "exported")
    register()
    watched = {kind.__name__: [e.axis for e in found] for kind, found in llm.MixtralModel.minitron_estimators().items()}
    result = {"losses": losses, "hooks": hooks, "threads": torch.get_num_threads(), "watched": watched}
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
