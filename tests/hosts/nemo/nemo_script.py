"""A NeMo user's own scripts, run by test_nemo_script.py in one process: import, validate with Pruning, the examples,
export, the connectors.

Arguments: folder with `pico` (a Hugging Face folder with a tokenizer) and `corpus.jsonl`; other sizes of a model, as
JSON. Prints JSON.
"""

import json
import runpy
import sys
from pathlib import Path

from nemo_importer import import_from_hf

EXAMPLES = Path(__file__).parents[3] / "examples"
KEEP = {"ffn": 64, "hidden": 40, "layers": 5}


def example(name: str, *arguments: Path) -> None:
    """Runs an example as `python examples/NAME` does: under the name __main__, which the helpers that save a checkpoint
    import."""
    sys.argv = [str(EXAMPLES / name), *map(str, arguments)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def resized(folder: Path, sizes: dict) -> list:
    """What NeMo and `read_context` find in a context whose sizes are edited as data."""
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.lightning.io.pl import TrainerContext

    from nemo_minitron.sources.context import read_context, resize_context

    model = llm.LlamaModel(llm.Llama2Config7B(hidden_size=64, num_attention_heads=8))
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy())
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(folder / "before", yaml_attrs=["model"])
    resize_context(folder / "before", folder / "after", sizes)
    loaded = nl.io.load_context(folder / "after", subpath="model")
    read = read_context(folder / "after")
    found = [{name: getattr(loaded.config, name) for name in sizes}, {name: read.config[name] for name in sizes}]
    return [type(loaded.config).__name__, read.config_class, loaded.config.seq_length, *found]


def main(folder: Path, sizes: dict) -> None:
    import nemo_minitron.backend as backend

    backend.setup()
    import torch
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.data import build, load_tokenizer
    from nemo_minitron.hosts.nemo.data_module import data_module
    from nemo_minitron.nemo import Importance, Pruning, register

    teacher = folder / "nemo-teacher"
    import_from_hf(folder / "pico", teacher)
    corpus = build(folder / "corpus.jsonl", load_tokenizer(folder / "pico"), folder / "corpus").prefix
    data = data_module(
        corpus, corpus, tokenizer=str(folder / "pico"), sequence_length=32, micro_batch_size=2, global_batch_size=2
    )
    importance = Importance(str(folder / "scores.safetensors"))
    pruning = Pruning(str(folder / "pruned"), KEEP, teacher=str(teacher))
    losses = []
    for callbacks in ([], [importance, pruning]):
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
    example("nemo_prune.py", teacher, corpus, folder / "pruned-live")
    example("nemo_distill.py", folder / "pruned-live" / "student", teacher, corpus, folder / "distilled")
    register()
    read = llm.LlamaModel(llm.Llama2Config7B())
    plan = folder / "pruned" / "plan.json"
    llm.import_ckpt(read, f"minitron://{folder / 'pico'}", output_path=folder / "read", plan=plan)
    llm.export_ckpt(folder / "read", "minitron", output_path=folder / "written")
    watched = {kind.__name__: [e.axis for e in found] for kind, found in llm.MixtralModel.minitron_estimators().items()}
    result = {"losses": losses, "hooks": hooks, "threads": torch.get_num_threads(), "watched": watched}
    result["resized"] = resized(folder, sizes)
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
