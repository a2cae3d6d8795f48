"""NeMo's importer of Hugging Face folders, for two processes at a time."""

from pathlib import Path


def import_from_hf(folder: Path, out: Path) -> None:
    """`llm.import_ckpt` of a Llama folder. NeMo puts the tokenizer of every import into one folder of /tmp on its way,
    so two imports at a time would mix theirs; here it goes beside `out`."""
    from nemo.collections import llm
    from nemo.lightning.io import ModelConnector

    ModelConnector.save_hf_tokenizer_assets.__defaults__ = (str(out.with_name(f"{out.name}-tokenizer")),)
    llm.import_ckpt(llm.LlamaModel(llm.Llama2Config7B()), f"hf://{folder}", output_path=out)
