"""A student's folder and its card."""

import ast
import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.export import CardFacts, finish_folder, write_card
from nemo_minitron.export.card import card_text
from nemo_minitron.families import family_of, from_hf

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 61,
    "tie_word_embeddings": True,
}


def write_model(folder, **sizes):
    """config.json and weights of zeros, in the shapes that the config says."""
    folder.mkdir()
    config = CONFIG | sizes
    (folder / "config.json").write_text(json.dumps(config))
    architecture = from_hf(config)
    names = family_of(config).hf_tensors(architecture)
    shapes = architecture.shapes()
    save_file(
        {n: np.zeros(shapes[parts[0]], np.float32) for n, parts in names.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture
def base(tmp_path):
    folder = write_model(tmp_path / "base")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


@pytest.fixture
def student(tmp_path):
    return write_model(tmp_path / "student", intermediate_size=16, num_hidden_layers=1)


def change_weights(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def test_what_is_missing_comes_from_the_base(student, base):
    files = finish_folder(student, base_folder=base)
    own, taken = ["config.json", "model.safetensors"], ["generation_config.json", "tokenizer.json"]
    assert files == sorted([*own, *taken, "tokenizer_config.json"])
    assert (student / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert finish_folder(student, base_folder=base) == files


def test_another_tokenizer_is_refused(student, base):
    (student / "tokenizer.json").write_text('{"other": true}')
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        finish_folder(student, base_folder=base)


def test_a_student_of_another_vocabulary_needs_its_own_tokenizer(tmp_path, base):
    student = write_model(tmp_path / "student", vocab_size=40)
    with pytest.raises(InputError, match="another vocabulary"):
        finish_folder(student, base_folder=base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (student / name).write_text('{"own": true}')
    finish_folder(student, base_folder=base)
    assert (student / "tokenizer.json").read_text() == '{"own": true}'


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if k != UP}, f"lacks the tensor '{UP}'"),
        (lambda t: t | {UP: np.zeros((15, 16), np.float32)}, r"\(15, 16\); its config.json says \(16, 16\)"),
        (
            lambda t: t | {"model.layers.7.extra": np.zeros(3, np.float32)},
            "does not mention: 'model.layers.7.extra'",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(student, base, change, says):
    change_weights(student, change)
    with pytest.raises(InputError, match=says):
        finish_folder(student, base_folder=base)


def test_a_stored_copy_of_a_tied_head_is_no_fault(student, base):
    change_weights(student, lambda t: t | {"lm_head.weight": np.zeros((61, 16), np.float32)})
    finish_folder(student, base_folder=base)


def test_missing_and_broken_files_are_refused(student, base):
    weights = student / "model.safetensors"
    index = student / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {UP: "model-2.safetensors"}}))
    with pytest.raises(InputError, match="lacks the shard"):
        finish_folder(student, base_folder=base)
    index.unlink()
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        finish_folder(student, base_folder=base)
    weights.unlink()
    with pytest.raises(InputError, match="no safetensors file"):
        finish_folder(student, base_folder=base)


# -- the card ----------------------------------------------------------------------------------------
@pytest.fixture
def facts():
    source = Architecture(
        num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3,
        head_dim=64, vocab_size=49152, tied_embeddings=True,
    )  # fmt: skip
    row = {"corpus": "wiki | held out", "tokens": 45123, "parameters": 83_978_944, "bits_per_byte": None}
    return CardFacts(
        name="smollm2-84m",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        source=source,
        target=source.replace(hidden_size=448, ffn_hidden_size=1024),
        criterion="l2,mean",
        samples=64,
        tokens=32768,
        plan_digest="ab" * 32,
        command="minitron compress smollm2 distillation.tokens=2000",
        license="apache-2.0",
        data=[{"name": "Wikipedia", "license": "CC BY-SA 3.0", "use": "calibration"}],
        distillation={
            "loss": "forward_kl", "tokens": 41000, "steps": 80, "precision": "bf16", "learning_rate": 1e-4,
        },
        numbers=[
            row | {"stage": "distilled", "loss": 4.2, "perplexity": 68.0},
            row | {"stage": "random", "loss": 18.4, "perplexity": 9.7e7},
            row | {"stage": "teacher", "loss": 2.8, "perplexity": 17.2, "bits_per_byte": 0.91},
        ],
        versions={"torch": "2.13.0"},
        limits=["English only."], base_note="dequantised from Q4_1", dtype="float32", chats=True,
        figures={"Perplexity": "figures/perplexity.png"},
    )  # fmt: skip


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_a_gemma_says_how_it_runs_and_what_was_rescaled(facts):
    """transformers' default attention leaves a cap of scores out; a cut of ffn alone rescales nothing."""
    assert "eager" not in card_text(facts)
    assert "Rescaled" not in card_text(facts)
    gemma = {"capped_attention": True, "scaled_embeddings": True}
    source, target = (facts.source.replace(**gemma), facts.target.replace(**gemma))
    text = card_text(dataclasses.replace(facts, source=source, target=target))
    assert 'dtype="float32", attn_implementation="eager")  # before' in text
    assert "- **Rescaled:** embeddings" in text
    alone = dataclasses.replace(facts, source=source, target=source.replace(ffn_hidden_size=64))
    assert "Rescaled" not in card_text(alone)


def test_the_card_says_what_was_done(tmp_path, facts):
    text = write_card(tmp_path, facts).read_text()
    assert text == (tmp_path / "README.md").read_text() == card_text(facts)
    assert front_matter(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "language": "en", "library_name": "transformers",
        "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["nemo", "minitron", "pruning", "distillation"],
    }  # fmt: skip
    for fact in (
        "134.5 M → 84.0 M parameters (−37.6 %)",
        "| hidden size | 576 | 448 | −22.2 % |",
        "| layers | 30 | 30 |",
        "| parameters | 134,515,008 | 83,978,944 |",
        "l2,mean, on 64 samples (32,768 tokens)",
        "ab" * 32,
        "forward_kl, 41,000 tokens in 80 steps, bf16, learning rate 0.0001",
        "| Wikipedia | CC BY-SA 3.0 | calibration |",
        "| distilled | wiki \\| held out | 83,978,944 | 4.200 | 68.00 | – | 45,123 |",
        "9.70e7",
        "45,123 tokens",
        "small differences are noise",
        "- English only.",
        "minitron compress smollm2 distillation.tokens=2000",
        "| torch | 2.13.0 |",
        "**Base model:** HuggingFaceTB/SmolLM2-135M-Instruct, dequantised from Q4_1",
        "83,978,944, stored as float32",
        'dtype="float32"',
        "apply_chat_template(messages",
        "![Perplexity](figures/perplexity.png)",
        "## Intended use",
    ):
        assert fact in text, fact
    assert text.index("| teacher |") < text.index("| cut at random |") < text.index("| distilled |")


def test_a_card_without_distillation_does_not_speak_of_it(facts):
    bare = dataclasses.replace(facts, distillation=None, numbers=(), data=(), versions={}, license=None)
    text = card_text(bare)
    assert "Distilled with" not in text
    assert "distillation" not in front_matter(text)["tags"]
    assert "should be distilled before it is used" in text
    assert "license" not in front_matter(text)
    assert "## Numbers" not in text


def test_a_card_without_scores_says_nothing_of_them(facts):
    text = card_text(dataclasses.replace(facts, criterion="", plan_digest="", chats=False, figures={}))
    assert "Scored by" not in text
    assert "**Plan:**" not in text
    assert "apply_chat_template" not in text
    assert "![" not in text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: llama3.2\n---\n# Base\n", {"license": "llama3.2"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("# No front matter\n", {"license": "apache-2.0"}),
        ("---\nlicense: [unclosed\n---\n", {"license": "apache-2.0"}),
        ("---\nlanguage: en\n---\n", {"license": "apache-2.0"}),
    ],
)
def test_the_bases_licence_goes_first(tmp_path, facts, card, expected):
    (tmp_path / "README.md").write_text(card)
    front = front_matter(card_text(dataclasses.replace(facts, base_folder=tmp_path)))
    assert {key: value for key, value in front.items() if key.startswith("license")} == expected
    shutil.rmtree(tmp_path)
    assert front_matter(card_text(dataclasses.replace(facts, base_folder=tmp_path)))["license"] == "apache-2.0"


def test_text_from_outside_cannot_break_the_card(facts):
    odd = "a\n---\nlicense: mine | <script>"
    text = card_text(dataclasses.replace(facts, name=odd, base_model=odd, limits=[odd]))
    assert front_matter(text)["license"] == "apache-2.0"
    assert front_matter(text)["base_model"] == "a --- license: mine | <script>"
    body = text.split("\n# ", 1)[1]
    assert "<script>" not in body
    assert "\n---" not in body


HOSTILE = (
    "![x](http://evil.example/x.png)", "[x](javascript:alert(1))", "\\![x](http://evil.example/x.png)",
    "<img src=http://evil.example/x.png>", "&lt;img src=http://evil.example/x.png&gt;", "`]![x](http://evil.example/x.png)`",
    '<a href="javascript:alert(1)">x</a>', "a/b)![x](http://evil.example/x.png", "x](http://evil.example) [y",
    "```\n![x](http://evil.example/x.png)\n```", '"); import os; os.system("id") #', "![x][y]\n\n[y]: http://evil.example/x.png",
)  # fmt: skip


@pytest.mark.parametrize("evil", HOSTILE)
def test_no_name_or_licence_becomes_an_image_a_link_or_code(tmp_path, facts, evil):
    """Read by a Markdown parser with HTML on: what is not the template's own is text."""
    from markdown_it import MarkdownIt

    row = dict.fromkeys(("name", "license", "use"), evil)
    numbers = [dict(facts.numbers[0], stage=evil, corpus=evil)]
    (tmp_path / "README.md").write_text(f"---\nlicense: {json.dumps(evil)}\nlicense_link: javascript:alert(1)\n---\n")
    odd = dataclasses.replace(
        facts, name=evil, base_model=evil, base_folder=tmp_path, criterion=evil, data=[row], numbers=numbers,
        versions={evil: evil}, limits=[evil], in_place=evil, command=f"minitron compress {evil}",
        base_note=evil, dtype=evil,
    )  # fmt: skip
    text = card_text(odd)
    assert "license_link" not in front_matter(text)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text.split("---\n", 2)[2])
    inside = [token for outer in tokens for token in (outer, *(outer.children or []))]
    assert not [token.content for token in inside if token.type in ("html_block", "html_inline")]
    assert [token.attrs["src"] for token in inside if token.type == "image"] == ["figures/perplexity.png"]
    links = {token.attrs["href"] for token in inside if token.type == "link_open"}
    assert links <= {"https://arxiv.org/abs/2407.14679", "https://github.com/NVIDIA/NeMo"}
    (python,) = (token.content for token in tokens if token.type == "fence" and token.info == "python")
    assert "os" not in {node.id for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Name)}


def test_a_card_says_nothing_that_a_terminal_acts_on(facts):
    odd = "a\x1b[2Jb\u202ec\x07"
    text = card_text(dataclasses.replace(facts, name=odd, base_model=odd, command=odd, limits=[odd], license=odd))
    assert not {"\x1b", "\u202e", "\x07"} & set(text)
    assert "a\\\\x1b" in text


def test_a_row_that_lacks_a_fact_is_refused(facts):
    with pytest.raises(InputError, match="lacks 'license'"):
        dataclasses.replace(facts, data=[{"name": "x", "use": "y"}])
    with pytest.raises(InputError, match="lacks 'steps'"):
        dataclasses.replace(facts, distillation={"loss": "kl", "tokens": 1})
