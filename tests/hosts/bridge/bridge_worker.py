"""Run by ranks.py, once for each world size: distillation in Bridge's loop, in every layout of that size.

Arguments: folder with models and a corpus, JSON list of cases, output folder. Each case leaves what `minitron distill`
leaves of a training: `loss.csv` and Bridge's checkpoints.
"""

import json

from ranks import leave_layout
from workers import leave, mask_some, process_group, run_cases


def run_case(case, folder, out):
    """Runs the training of a case. `stops`: the steps after which it stops, to be resumed by a new training."""
    import pytest

    from nemo_minitron.errors import InputError
    from nemo_minitron.hosts.bridge.host import BRIDGE
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.settings.orders import DistillOrder
    from nemo_minitron.settings.recipe import Distillation
    from nemo_minitron.sources.folder import HFSource

    student, corpus = folder / case["student"], folder / case.get("corpus", "corpus")
    recipe = Distillation(**case["recipe"])
    made = out / case["name"]
    made.mkdir(exist_ok=True)
    for stop, sizes in zip(case.get("stops") or [None], case["layouts"], strict=True):
        layout = Layout(**sizes).for_depth(HFSource(student).architecture.num_layers)
        order = DistillOrder(
            student, folder / case["teacher"], corpus, corpus, made, folder / "index", recipe, layout, stop,
            folder / case["plan"], case.get("common"),
        )  # fmt: skip
        if case.get("diverges"):
            diverge(case, order, made)
            continue
        lost = made / "bridge" / "checkpoints" / case.get("loses", "")
        if stop is None and lost.is_file():
            lost.unlink()
            with pytest.raises(InputError) as refused:
                BRIDGE.train(order)
            (made / "refused.json").write_text(json.dumps(str(refused.value)))
        else:
            BRIDGE.train(order)
        forget()


def diverge(case, order, made):
    """Makes the last rank's loss of step 3 NaN, or a weight after that step infinite. Writes each rank's error."""
    import torch

    from nemo_minitron.distillation import step as steps
    from nemo_minitron.errors import DivergedError
    from nemo_minitron.hosts.bridge import loop
    from nemo_minitron.hosts.bridge.host import BRIDGE

    rank, seen = torch.distributed.get_rank(), []
    last = rank == torch.distributed.get_world_size() - 1
    micro_batches = case["recipe"]["global_batch_size"]

    def loss(original, self, *given):
        seen.append(1)
        return original(self, *given) * (float("nan") if last and len(seen) > 2 * micro_batches else 1)

    def weights(original, self, context):
        seen.append(1)
        if last and len(seen) == 3:
            next(context.model[0].parameters()).data.view(-1)[0] = float("inf")
        return original(self, context)

    home, name, change = {
        "loss": (steps.Objective, "total", loss), "weights": (loop.Watch, "on_train_step_end", weights)
    }[case["diverges"]]  # fmt: skip
    original = getattr(home, name)
    setattr(home, name, lambda *given: change(original, *given))
    try:
        BRIDGE.train(order)
        said = "nothing"
    except DivergedError as error:
        said = str(error)
    setattr(home, name, original)
    (made / f"said-{rank}.json").write_text(json.dumps(said))
    forget()


def forget():
    """Clears what Megatron keeps of a layout between two trainings in one process."""
    from megatron.core import num_microbatches_calculator, rerun_state_machine

    leave_layout()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()


def main():
    with process_group():
        mask_some()
        run_cases(run_case)
    leave()
