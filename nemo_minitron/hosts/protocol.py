"""What the package asks of a host: the framework that builds and trains a model. NeMo's is `hosts/nemo/host.py`.

A second host needs three things:

1. An object with the attributes and methods of `Host`. `hosts.host_of` returns it.
2. A module `worker`. The launcher starts it in each process of a stage, as `python -m WORKER STAGE ORDER.json`, with
   RANK, WORLD_SIZE and LOCAL_RANK in the environment. It reads the order (`settings.orders.read_order`) and runs the
   stage: `megatron.estimate.estimate(order, host)` for "estimate", and in the same way `megatron.prune.prune`,
   `megatron.compensate.compensate` and `megatron.cache.cache_logits` for "prune", "compensate" and "cache";
   `host.train(order)` for "distill" and `host.finetune(order)` for "finetune".
3. A training loop that calls the hooks of `megatron.distiller.Distiller`, whose docstring says when.

What the launcher expects of a worker (`hosts/nemo/worker.py` is an example):

- It writes the sentence of an InputError to the file `refused-RANK` in the folder that MINITRON_ERRORS names, and ends
  with exit code 2. It reports the sentence of any other error with `settings.progress.tell(rank=..., error=...)`.
- If MINITRON_LIFELINE is set, its standard input is a pipe from the launcher. It ends at once when the pipe closes. A
  byte asks it to save a checkpoint and to end: it sets `megatron.shutdown.ASKED`, and the training ends with the exit
  code `megatron.shutdown.SAVED`.
- It reports its progress with `settings.progress.tell(rank=..., pid=..., layers=..., mark=...)` every
  `stall_timeout() / EVERY` seconds (`launch.stall`). `mark` is any JSON value that changes when the rank makes
  progress, and `layers` the number of layers' forward passes that it has done.

Two processes call a host. The process of the command checks the input and starts the stage: it must stay light, so
importing `host.py` must not import the framework. The worker's processes do the work. "Collective" says that all of
them call a method together and that it may communicate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import DistillOrder, FinetuneOrder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemo_minitron.megatron.depth import DepthCriteria
    from nemo_minitron.megatron.estimate import Estimation


class Host(Protocol):
    """A framework as the commands and the workers see it."""

    name: str  # a word for messages
    worker: str  # the module that runs a stage
    checkpoints: str  # the folder of a training's checkpoints, relative to the training's own

    def keep_whole(self, checkpoints: Path) -> tuple[dict[int, Path], list[str]]:
        """Removes all checkpoints of a training but the newest one that is complete.

        Called in the process of the command, before a training is resumed: a kill may have left a half-written
        checkpoint, from which the framework would resume. `checkpoints`: the folder that `train` and `finetune` save
        to. It exists.

        Returns {number of steps done: checkpoint}, which has one entry or none, and one sentence for each damaged
        checkpoint that was removed. The command prints the sentences. Raises OSError if the folder cannot be read.
        """
        ...

    def build(self, config: Mapping[str, Any], *, precision: str, layout: Layout) -> list[Any]:
        """Builds the part of a model that belongs to this rank, without its weights. Collective.

        Called in the worker's processes; `megatron.live.fill` then writes the weights. `config`: a Hugging Face config
        as a dict. `precision`: fp32, bf16 or one of the fp8 names of `precisions`. `layout`: how the processes divide
        the model.

        Returns one Megatron-core GPTModel for each virtual stage of this rank, on this rank's device, in the
        precision's dtype. Their vocabulary is padded to a multiple of the tensor-parallel size. The method starts
        Megatron's parallel groups (`megatron.groups.start`) if they do not exist, and uses those that do.

        Raises InputError if the framework has no such model, or if the model cannot have this precision or layout.
        """
        ...

    def save(self, chunks: list[Any], folder: Path, teacher: Path, plan: PrunePlan) -> None:
        """Writes a student as a checkpoint of the framework, of the class of its teacher's family. Collective.

        Called in the worker of `prune`, which has one process. `chunks`: the student's filled chunks, from `build`.
        `folder`: an empty folder. The caller moves it to its place once it is complete, so the method needs no
        temporary files. `teacher`: the teacher's checkpoint, which may be another host's. The student gets its
        tokenizer, and its settings if it is this host's. `plan`: its `target` has the student's sizes.

        The checkpoint must not name a class of this package. `sources.open` must be able to read it. Raises OSError
        if it cannot be written.
        """
        ...

    def rows(self, estimation: Estimation, first: int, samples: int, length: int) -> Sequence[dict[str, Any]]:
        """Rows of the calibration's text, of the corpus `estimation.tokens`.

        Called in each of the worker's processes of `estimate`; all of them get the same rows. The rows are those of
        Megatron's GPT dataset, in the order that `estimation.calibration.seed` gives one epoch
        (`megatron.dataset.windowed`).

        Returns `length` rows. The first ones are the rows `first` to `samples` - 1 of the order. The rest have a
        `loss_mask` of zeros, because a layout needs a number that it can divide. A row holds `tokens`, `labels` and
        `position_ids` (int64) and `loss_mask` (fp32), each [sequence_length].

        Raises InputError if the corpus is too short.
        """
        ...

    def validate(self, estimation: Estimation, depth: DepthCriteria) -> None:
        """Scores the rows that are left of a calibration, in the framework's own validation loop. Collective.

        Called in the worker's processes of `estimate`. The model is `estimation.source`, in `estimation.layout`. The
        rows are those of `rows(estimation, estimation.done, calibration.samples, ...)`. Their statistics are added to
        `estimation.before`, and rank 0 saves them to `estimation.statistics` every `estimation.save_every` batches and
        at the end. A validation that was killed and resumed must end with the same bits. Afterwards the method calls
        `depth.run(chunks)` on the same model, which need not be built twice.

        Raises InputError if the corpus is too short, or if the model cannot have this precision or layout.
        """
        ...

    def train(self, order: DistillOrder) -> None:
        """Trains the student of an order by distillation, from its last checkpoint if there is one. Collective.

        Called in the worker's processes of `distill`. `artifacts.run_folder.TrainingFolder(order.out)` has the names
        of what the method leaves: `loss.csv` with a row a step, `validation.csv` if the recipe validates, the
        checkpoints, and `last.json` with the last checkpoint's path and, if the training ended early, its step. The
        loss and the gradients must be those of `megatron.distiller.Distiller`. Training ends at `order.stop` if that
        is set; the schedule and the data stay those of all steps.

        Raises InputError for a bad setting or a damaged checkpoint, and DivergedError on all ranks if a loss, the
        gradients' norm or a weight is not finite. Ends the process with `megatron.shutdown.SAVED` if it was asked to
        save and to end.
        """
        ...

    def finetune(self, order: FinetuneOrder) -> None:
        """Trains the student of an order on prompts and answers. Collective.

        Called in the worker's processes of `finetune`. `order.data`: a folder with `training.jsonl`. The loss leaves
        the prompts out. What the method leaves and raises is the same as for `train`.
        """
        ...
