"""The text of a model that reads pictures, too, as a folder of its own."""

import json
import shutil

import pytest
from pico import SIZES
from words import save_tokenizer

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.model import load
from nemo_minitron.families import from_hf
from nemo_minitron.pruning.convert import convert


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of a model that reads pictures, as transformers writes it, and the model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = Gemma3TextConfig(**SIZES, sliding_window=8, pad_token_id=0).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    config.eos_token_id = [1, 42]  # as the chat models: the end of the text, and that of a turn
    model, folder = Gemma3ForConditionalGeneration(config).eval(), tmp_path_factory.mktemp("gemma") / "pictures"
    model.save_pretrained(folder)
    save_tokenizer(folder, ["some words of a text"], size=64)
    (folder / "LICENSE").write_text("terms")
    (folder / "preprocessor_config.json").write_text("{}")
    return folder, model


def changed(folder, target, change):
    """A copy of the folder with other tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def as_google(name):
    """The name that Google's files have for a tensor, whichever version of transformers wrote it."""
    inner = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    seen = inner.startswith(("vision_tower", "multi_modal"))
    return inner if seen else f"language_model.{'' if inner.startswith('lm_head') else 'model.'}{inner}"


def as_transformers(name):
    """The name that transformers gives since 4.52."""
    inner = as_google(name)
    return inner.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")


@pytest.mark.parametrize("named", [str, as_google, as_transformers])
def test_the_text_has_the_models_logits(pictures, named, tmp_path):
    import torch

    folder, model = pictures
    folder = changed(folder, tmp_path / "t", lambda tensors: {named(name): bits for name, bits in tensors.items()})
    with pytest.raises(InputError, match="only text is supported; `minitron convert MODEL FOLDER` makes a folder"):
        from_hf(folder)
    made = convert(folder, tmp_path / "text")
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(made, "fp32")(tokens).logits, model(input_ids=tokens).logits)


def test_the_folder_holds_the_texts_files_alone(pictures, tmp_path):
    made = convert(pictures[0], tmp_path / "text")
    assert (made / "LICENSE").is_file()
    assert (made / "tokenizer.json").is_file()
    assert not (made / "preprocessor_config.json").exists()
    config = json.loads((made / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Gemma3ForCausalLM"], "gemma3_text")
    assert config["eos_token_id"] == [1, 42]
    assert not config.keys() & {"vision_config", "text_config", "image_token_index", "image_token_id"}


def test_the_texts_defaults_may_be_left_out(pictures, tmp_path):
    """As in the published config of 4B, which says the sizes that are not the class's defaults."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from nemo_minitron.sources.text_of import text_config

    sizes = {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "sliding_window": 1024}
    text = sizes | {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = text_config(tmp_path)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(Gemma3TextConfig(**text))
    assert from_hf(found).parameters() == model.num_parameters() == 3_880_263_168


def test_a_tensor_that_nobody_knows_is_refused(pictures, tmp_path):
    folder = changed(pictures[0], tmp_path / "t", lambda bits: bits | {"audio.weight": bits[min(bits)].clone()})
    with pytest.raises(InputError, match=r"has the tensor 'audio.weight', which its config"):
        convert(folder, tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_a_config_without_its_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma3ForConditionalGeneration"]}')
    with pytest.raises(InputError, match="has the text_config None; it must be a mapping"):
        convert(tmp_path, tmp_path / "text")
