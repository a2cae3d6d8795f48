"""The processor's seconds of a training step in Bridge's own loop: this package's distillation, ModelOpt's, and plain
training.

Everything else is the same: the pair of models in fp32, the rows, the optimizer, the process. The three take turns. Set
OMP_NUM_THREADS=1, so that waiting threads are not counted.

    .venv-bridge/bin/python benchmarks/bridge_distillers.py STUDENT TEACHER CORPUS --steps 8 --turns 3

STUDENT and TEACHER are Hugging Face folders, CORPUS is the prefix of Megatron's .bin/.idx files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

KINDS = ("plain", "nemo_minitron", "ModelOpt")
LENGTH, ROWS, WARM = 256, 4, 2  # tokens of a row, rows of a step, steps that are not timed
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "HF_HUB_OFFLINE": "1"}


def settings(student: str, corpus: str, steps: int) -> Any:
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training import config as bridge

    return bridge.ConfigContainer(
        model=provider(AutoBridge, student),
        train=bridge.TrainingConfig(train_iters=steps, micro_batch_size=1, global_batch_size=ROWS),
        validation=bridge.ValidationConfig(eval_iters=0),
        optimizer=bridge.OptimizerConfig(optimizer="adam", lr=1e-4, min_lr=1e-5, use_distributed_optimizer=True),
        scheduler=bridge.SchedulerConfig(lr_decay_style="cosine", start_weight_decay=0.1, end_weight_decay=0.1),
        ddp=bridge.DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=bridge.GPTDatasetConfig(
            random_seed=1234, seq_length=LENGTH, blend=([corpus], None), split="1,0,0", num_workers=0,
            reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, dataloader_type="single",
        ),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=student),
        checkpoint=bridge.CheckpointConfig(),
        logger=bridge.LoggerConfig(log_interval=1),
        rng=bridge.RNGConfig(seed=1234),
        dist=bridge.DistributedInitConfig(distributed_backend="nccl" if torch.cuda.is_available() else "gloo"),
    )  # fmt: skip


def provider(auto: Any, folder: str) -> Any:
    """Bridge's provider in fp32, whatever dtype the folder has."""
    import torch

    model = auto.from_hf_pretrained(folder).to_megatron_provider(load_weights=True)
    model.seq_length, model.gradient_accumulation_fusion = LENGTH, False
    model.bf16, model.params_dtype, model.pipeline_dtype = False, torch.float32, torch.float32
    return model


def train(kind: str, student: str, teacher: str, corpus: str, steps: int) -> None:
    """Trains in this process and prints the seconds and the loss of each step as one line of JSON."""
    from nemo_minitron.bridge import Distillation, setup

    setup()
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step, forward_step_modelopt
    from megatron.bridge.training.pretrain import pretrain

    class Clock(Callback):
        def __init__(self) -> None:
            self.ends, self.losses = [time.process_time()], []

        def on_train_step_end(self, context: Any) -> None:
            self.ends.append(time.process_time())
            self.losses.append({name: float(value) for name, value in context.loss_dict.items()})

    config, clock = settings(student, corpus, steps), Clock()
    step, callbacks = forward_step, [clock]
    if kind == "nemo_minitron":
        distillation = Distillation(config, teacher, precision="fp32")
        step, callbacks = distillation.forward_step, [distillation, clock]
    if kind == "ModelOpt":
        from megatron.bridge.models.distillation_provider import convert_to_distillation_provider
        from megatron.bridge.training.post_training.distillation import ModelOptDistillConfig

        kd = ModelOptDistillConfig(logit_kl_temperature=1.0, skip_lm_loss=True)
        config.model = convert_to_distillation_provider(config.model, provider(AutoBridge, teacher), kd)
        step = forward_step_modelopt
    pretrain(config, step, callbacks=callbacks)
    seconds = [after - before for before, after in itertools.pairwise(clock.ends)]
    print("STEPS" + json.dumps({"seconds": seconds[WARM:], "losses": clock.losses}), flush=True)


def one(kind: str, options: argparse.Namespace, port: int) -> dict[str, Any]:
    words = [options.student, options.teacher, options.corpus, "--steps", str(options.steps), "--kind", kind]
    environment = os.environ | ALONE | {"MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, os.path.abspath(__file__), *words], env=environment, cwd=folder, capture_output=True,
            text=True,
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("STEPS")]
    if done.returncode or not lines:
        sys.exit(f"{kind} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return dict(json.loads(lines[0].removeprefix("STEPS")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("corpus")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("student", "teacher", "corpus"):
        setattr(options, name, os.path.abspath(getattr(options, name)))
    if options.kind:
        train(options.kind, options.student, options.teacher, options.corpus, options.steps)
        return
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.turns):
        for count, kind in enumerate(KINDS):
            run = one(kind, options, 29600 + 10 * turn + count)
            seconds[kind] += run["seconds"]
            print(
                f"turn {turn + 1}  {kind:14} {statistics.median(run['seconds']):.3f} s  {run['losses'][0]}", flush=True
            )
    plain = statistics.median(seconds["plain"])
    for kind in KINDS:
        print(
            f"{kind:14} {statistics.median(seconds[kind]):.3f} s a step, {statistics.median(seconds[kind]) / plain:.2f}"
        )


if __name__ == "__main__":
    main()
