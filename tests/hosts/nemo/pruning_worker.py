"""Run by ranks.py: NeMo's validation of a live model in a layout, with Pruning and no teacher.

Arguments: teacher, corpus, output folder, JSON of what stays, JSON of the layout.
"""

import json
import sys

from distill_worker import start_each_time
from workers import leave, process_group


def main():
    teacher, corpus, out, keep, sizes = sys.argv[1:]
    with process_group():
        import torch
        from nemo import lightning as nl

        from nemo_minitron.hosts.nemo.data_module import data_module
        from nemo_minitron.hosts.nemo.distill import FillStudent
        from nemo_minitron.hosts.nemo.models import nemo_model
        from nemo_minitron.megatron.groups import model_sizes
        from nemo_minitron.nemo import Pruning
        from nemo_minitron.settings.layout import Layout
        from nemo_minitron.sources.open import open_source

        start_each_time()
        source, layout = open_source(teacher), Layout(**json.loads(sizes))
        data = data_module(
            corpus, corpus, tokenizer=teacher, sequence_length=32, micro_batch_size=2, global_batch_size=2,
            index_folder=f"{out}-index",
        )  # fmt: skip
        trainer = nl.Trainer(
            accelerator="cpu", devices=layout.processes, max_steps=1, limit_val_batches=4, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
            strategy=nl.MegatronStrategy(**model_sizes(layout), pipeline_dtype=torch.float32),
            plugins=nl.MegatronMixedPrecision(precision="32"),
            callbacks=[FillStudent(source), Pruning(out, json.loads(keep))],
        )  # fmt: skip
        trainer.validate(nemo_model(source.config, tokenizer=data.tokenizer, layout=layout), data, verbose=False)
    leave()


if __name__ == "__main__":
    main()
