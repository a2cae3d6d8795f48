"""The connector `minitron` for NeMo's `llm.import_ckpt` and `llm.export_ckpt`. It is the same for every family.

It uses the canonical mapping of tensors and the model's own vocabulary. NeMo's connector `hf` is wrong for some
families.
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
    """`llm.import_ckpt(model, "minitron://TEACHER", out, plan="plan.json")` writes the plan's student as a NeMo
    checkpoint; without a plan it writes the whole model.

    TEACHER is a Hugging Face folder or a NeMo checkpoint. Only what the plan keeps is read from it. The checkpoint is
    of NeMo's class for the teacher's family. The import runs in one process.

    Raises InputError if the source or the plan cannot be read, or if they do not belong together.
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
    """`llm.export_ckpt(CHECKPOINT, "minitron", out)` writes a Hugging Face folder with the tokenizer, in the dtype of
    the checkpoint's weights.

    Raises InputError if the checkpoint is damaged or has no tokenizer.
    """

    def apply(self, output_path: Path) -> Path:
        return convert(Path(str(self)), output_path)


def connect(llm: Any) -> None:
    """Registers both connectors with NeMo's class of each family. `llm`: the module `nemo.collections.llm`."""
    for family in FAMILIES:
        kind = getattr(llm, family.nemo_model)
        kind.register_importer(NAME)(Importer)
        kind.register_exporter(NAME)(Exporter)
