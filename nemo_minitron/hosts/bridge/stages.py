"""The distill stage: Bridge's training loop trains a student on its teacher's outputs."""

from __future__ import annotations

from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.hosts.bridge.load import load_training
from nemo_minitron.hosts.distillation import options_of
from nemo_minitron.settings.orders import DistillOrder
from nemo_minitron.sources.checkpoint_files import check_resumable


def distill(order: DistillOrder) -> None:
    """Trains the order's student, from its last checkpoint if there is one. `hosts.protocol.Host.train` says what it
    leaves and raises."""
    load_training()
    from nemo_minitron.hosts.bridge.data import Corpora
    from nemo_minitron.hosts.bridge.distill import Distillation
    from nemo_minitron.hosts.bridge.loop import Watch, run
    from nemo_minitron.hosts.bridge.trainer import fill_first, settings
    from nemo_minitron.sources.open import open_source

    recipe, out = order.distillation, order.out
    student = open_source(order.student)
    corpora = Corpora(order, student)
    config = settings(student, recipe, order.layout, out, corpora.config)
    check_resumable(TrainingFolder(out).bridge)
    distillation = Distillation(config, **options_of(order))
    fill_first(config, student, recipe.seed if recipe.start == "random" else None)
    run(
        config, distillation.forward_step, [distillation], watch=Watch(out, recipe, distillation),
        datasets=corpora.datasets, held_out=corpora.held_out, vocab_size=student.architecture.vocab_size,
        stop=order.stop,
    )  # fmt: skip
