"""Run by ranks.py, once for each world size: distillation through NeMo's trainer in every layout of that size.

Arguments: folder with models and a corpus, JSON list of cases, output folder, and perhaps the case whose last
checkpoint a user's own script goes on from. Each case leaves what `minitron distill` leaves of a training: `loss.csv`
and NeMo's checkpoints.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

from ranks import leave_layout
from workers import leave, mask_some, process_group, run_cases


def run_case(case, folder, out):
    """Runs the training of a case. `stops`: the steps after which it stops, to be resumed by a new trainer."""
    from nemo_minitron.hosts.nemo import stages
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.settings.orders import DistillOrder
    from nemo_minitron.settings.recipe import Distillation
    from nemo_minitron.sources.folder import HFSource

    student, corpus = folder / case["student"], folder / case.get("corpus", "corpus")
    layout = Layout(**case["layout"]).for_depth(HFSource(student).architecture.num_layers)
    recipe = Distillation(**case["recipe"])
    made = out / case["name"]
    made.mkdir(exist_ok=True)
    order = DistillOrder(
        student, folder / case["teacher"], corpus, corpus, made, folder / "index", recipe, layout,
        plan=folder / case["plan"], common_vocabulary=case.get("common"),
    )  # fmt: skip
    asked = ways_of_the_head(several=case.get("world") != 1)
    if case.get("gradients"):
        keep_the_first_step(made, HFSource(student).architecture)
    if case.get("diverges"):
        diverge(case, order, made)
        return
    for stop in case.get("stops") or [None]:
        stages.distill(dataclasses.replace(order, stop=stop))
        forget()
    if asked:  # on the ranks with a fused head
        (made / "main_grad.json").write_text(json.dumps(sorted(asked)))


def diverge(case, order, made):
    """Makes the last rank's numbers of step 3 NaN: its loss, its gradients, or a weight after the step. Writes each
    rank's error. Lightning ends the process group with it, so this must be a worker's last case."""
    import torch

    from nemo_minitron.distillation import step as steps
    from nemo_minitron.errors import DivergedError
    from nemo_minitron.hosts.nemo import distill, loss_log, stages
    from nemo_minitron.hosts.nemo.trainer import chunks_of

    rank, seen = torch.distributed.get_rank(), []
    last = rank == torch.distributed.get_world_size() - 1

    def spoil(home, name, change):
        original = getattr(home, name)

        @functools.wraps(original)  # whose parameters NeMo looks at
        def spoilt(self, *given, **options):
            result = original(self, *given, **options)
            seen.append(1)
            return change(result, len(seen), *given, **options)

        setattr(home, name, spoilt)

    def loss(result, count, *_, **__):
        dealt = case["recipe"]["global_batch_size"] // case["layout"].get("dp", 1)
        return result * float("nan") if last and count > 2 * dealt else result

    def gradient(result, count, step):
        if last and count == 3:
            next(chunks_of(step.trainer)[0].parameters()).main_grad.view(-1)[:] = float("nan")

    def weights(result, count, trainer, *_, **__):
        if last and count == 3:
            next(chunks_of(trainer)[0].parameters()).data.view(-1)[0] = float("inf")

    places = {
        "loss": (steps.Objective, "total", loss),
        "gradient": (distill.Distillation, "on_megatron_microbatches_end", gradient),
        "weights": (loss_log.LossLog, "on_train_batch_end", weights),
    }
    spoil(*places[case["diverges"]])
    try:
        stages.distill(order)
        said = "nothing"
    except DivergedError as error:
        said = str(error)
    (made / f"said-{rank}.json").write_text(json.dumps(said))


def keep_the_first_step(made, architecture):
    """Writes the optimizer's gradients, unsharded and by canonical name, and the micro-batches of one process."""
    import numpy as np
    import torch

    from nemo_minitron.hosts.nemo import distill
    from nemo_minitron.sources.tensors import whole

    inputs, finish, batches = distill.model_inputs, distill.Distillation.on_megatron_microbatches_end, []

    def seen(batch):
        if not any(batch is other for other in batches):
            batches.append(batch)
        return inputs(batch)

    def end(self, step):
        distill.model_inputs, distill.Distillation.on_megatron_microbatches_end = inputs, finish
        finish(self, step)
        source = gradients_of(step.trainer, architecture)
        found = {
            name: source.read(name, whole(shape)).view(np.float32) for name, shape in architecture.shapes().items()
        }
        if torch.distributed.get_rank() == 0:
            np.savez(made / "gradients.npz", **found)
        if torch.distributed.get_world_size() == 1:
            rows = {name: torch.cat([b[name] for b in batches]).numpy() for name in ("tokens", "loss_mask")}
            np.savez(made / "batches.npz", **rows)

    distill.model_inputs, distill.Distillation.on_megatron_microbatches_end = seen, end


def gradients_of(trainer, architecture):
    """The gradients that Megatron's distributed optimizer reads, as a live model. Each data-parallel rank has a part of
    the sums, so they are gathered first."""
    import torch

    from nemo_minitron.hosts.nemo.trainer import chunks_of
    from nemo_minitron.megatron.live import LiveSource

    for ddp in trainer.strategy.megatron_parallel:
        while not hasattr(ddp, "expert_parallel_buffers"):
            ddp = ddp.module
        for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                parts = bucket.grad_data.chunk(torch.distributed.get_world_size(group))
                part = parts[torch.distributed.get_rank(group)].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, part, group=group)
    source = LiveSource(chunks_of(trainer), architecture)
    shards = source._shards.items()
    source._shards = {name: [(p.main_grad, piece) for p, piece in places] for name, places in shards}
    return source


def ways_of_the_head(several):
    """One process keeps the fused head's gradient apart; `several` processes add it to main_grad. Returns a set that
    gets each answer that the step was given."""
    from nemo_minitron.distillation import fused_head, step

    asked = set()

    def accumulates(weight):
        asked.add(several and fused_head.accumulates(weight))
        return several and fused_head.accumulates(weight)

    step.accumulates = accumulates
    return asked


def user_script(folder, checkpoint, out):
    """A user's own `llm.train` with one callback of this package. Writes the losses that it logs, and a refusal."""
    from lightning.pytorch.callbacks import Callback
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.errors import InputError
    from nemo_minitron.hosts.nemo.data_module import data_module
    from nemo_minitron.nemo import Distillation

    logged, refused = [], None

    class Logged(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def fit(average):
        corpus = folder / "corpus"
        data = data_module(
            corpus, corpus, tokenizer=str(folder / "student"), sequence_length=24, micro_batch_size=2,
            global_batch_size=4, index_folder=str(folder / "index"),
        )  # fmt: skip
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, average_in_collective=average)
        distillation = Distillation(str(folder / "teacher"), lm_weight=1.0, precision="fp32")
        trainer = nl.Trainer(
            accelerator="cpu", devices=1, max_steps=2, limit_val_batches=0, logger=False, log_every_n_steps=1,
            enable_checkpointing=False, use_distributed_sampler=False, enable_progress_bar=False,
            strategy=nl.MegatronStrategy(ddp=ddp), plugins=nl.MegatronMixedPrecision(precision="32"),
            callbacks=[distillation, Logged()],
        )  # fmt: skip
        llm.train(
            nl.io.load_context(checkpoint / "context", subpath="model"), data, trainer,
            log=nl.NeMoLogger(explicit_log_dir=str(out / "script")),
            optim=nl.MegatronOptimizerModule(OptimizerConfig(lr=1e-3, use_distributed_optimizer=True)),
            resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(checkpoint))),
        )  # fmt: skip
        forget()

    fit(False)
    try:
        fit(True)
    except InputError as error:
        refused = str(error)
    (out / "script.json").write_text(json.dumps({"logged": logged, "refused": refused}))


def start_each_time():
    """Makes NeMo's strategy start Megatron's groups for each training. It would start them only with the process group,
    which several trainings share here."""
    from megatron.core import parallel_state
    from nemo.lightning._strategy_lib import init_model_parallel
    from nemo.lightning.pytorch.strategies import MegatronStrategy

    first = MegatronStrategy.setup_distributed

    def setup_distributed(self):
        first(self)
        if not parallel_state.model_parallel_is_initialized():
            init_model_parallel(self.model)
            if self.data_sampler:
                self.data_sampler.setup(self.cluster_environment.global_rank())

    MegatronStrategy.setup_distributed = setup_distributed


def forget():
    """Clears what Megatron and NeMo keep of a layout between two trainings in one process."""
    from megatron.core import num_microbatches_calculator
    from nemo.utils import AppState
    from nemo.utils.metaclasses import Singleton

    leave_layout()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    Singleton._Singleton__instances.pop(AppState, None)


def main():
    with process_group():
        mask_some()
        start_each_time()
        run_cases(run_case)
        if len(sys.argv) > 4:  # it comes last, because Lightning ends the process group with a trainer that failed
            from nemo_minitron.sources.checkpoint import last_checkpoint

            folder, out = Path(sys.argv[1]), Path(sys.argv[3])
            user_script(folder, last_checkpoint(out / sys.argv[4]), out)
    leave()


if __name__ == "__main__":
    main()
