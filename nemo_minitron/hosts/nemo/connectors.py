"""The connector `minitron` of NeMo's `llm.import_ckpt` and `llm.export_ckpt`, the same for every family.

It goes by the canonical mapping and the model's own vocabulary; NeMo's connector `hf` has faults in some families.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.lightning import io, teardown

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.families import FAMILIES, family_of
from nemo_minitron.hosts.nemo.data_module import nemo_tokenizer
from nemo_minitron.hosts.nemo.models import nemo_model
from nemo_minitron.megatron.live import fill
from nemo_minitron.megatron.prune import precision_of
from nemo_minitron.pruning.convert import convert
from nemo_minitron.pruning.cut import check_plan
from nemo_minitron.sources.open import open_source

NAME = "minitron"


class Importer(io.ModelConnector):
    """`llm.import_ckpt(model, "minitron://TEACHER", out, plan="plan.json")`: the plan's student, or all of the model.

    TEACHER: a Hugging Face folder or a NeMo checkpoint, of which only what the plan keeps is read. The checkpoint is
    of NeMo's class of the teacher's family, in one process. Raises InputError for a source or a plan that is not legal.
    """

    def apply(self, output_path: Path, plan: PrunePlan | str | Path | None = None) -> Path:
        source = open_source(str(self))
        plan = PrunePlan.load(plan) if isinstance(plan, (str, Path)) else plan
        config = source.config
        if plan is not None:
            check_plan(plan, source)
            config = family_of(config).config(plan.target, config, plan.keep.get("layers"))
        self.tokenizer = nemo_tokenizer(source.folder, output_path.with_name(f".{output_path.name}.tokenizer"))
        model = nemo_model(config, tokenizer=self.tokenizer, precision=precision_of(source))
        trainer = self.nemo_setup(model)
        fill([unwrap(model.module)], source, plan)
        self.nemo_save(output_path, trainer)
        teardown(trainer, model)
        return output_path


class Exporter(io.ModelConnector):
    """`llm.export_ckpt(CHECKPOINT, "minitron", out)`: a Hugging Face folder with the tokenizer, in the weights' dtype.

    Raises InputError for a damaged checkpoint or one without its tokenizer.
    """

    def apply(self, output_path: Path) -> Path:
        return convert(Path(str(self)), output_path)


def connect(llm: Any) -> None:
    """Registers both with NeMo's class of each family."""
    for family in FAMILIES:
        kind = getattr(llm, family.nemo_model)
        kind.register_importer(NAME)(Importer)
        kind.register_exporter(NAME)(Exporter)
