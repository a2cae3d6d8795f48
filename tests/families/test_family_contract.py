"""One contract for every family, on random models made by transformers: folder to folder, exact axes, and (under
one torchrun) NeMo's own class of the family, whole and split over two ranks, with a vocabulary that no rank divides.

Mutations tried, each of which fails here: gate and up, or k and v, in the other order in Phi-3's fused tensors; its
window left out; Nemotron's norms without the 1 that their weights lack, or with rotary positions on the whole head;
NeMo's own activation for another; linear scaling of positions left out; `layer_types` of a shorter Qwen2 left long.
"""

import json
from pathlib import Path

import contract
import ml_dtypes
import numpy as np
import pytest
from contract import DEPTH, FFN, GROUPS, HEAD_DIM, HEADS, HERE, HIDDEN, NAMES, NEMO_NAMES
from pico import raw_tensors, save_tensors
from ranks import run_ranks
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.families import FAMILIES, from_hf, read_config, written_config
from nemo_minitron.pruning import HFSource, prune

WORKER = Path(__file__).parent / "contract_worker.py"
# What NeMo's importers can read at all: of the families that are not here, any untied model. Qwen2's and Phi-3's take
# head_dim for hidden / heads, Qwen3's for 128, with 8 of 128 experts, Phi-3's reads no query groups.
FULL_ONLY = {"use_sliding_window": False}  # neither Qwen2's nor Qwen3's importer reads a window
IMPORTED = {"qwen2": FULL_ONLY | {"head_dim": 4}, "qwen3": FULL_ONLY | {"head_dim": 128}}
IMPORTED |= {"phi3": {"head_dim": 4, "num_key_value_heads": HEADS}}
IMPORTED |= {"qwen3_moe": {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 8}}
# Fields of NeMo's config that its importers set otherwise than transformers reads the folder. The vocabulary is left
# to a tokenizer; the window is one token too long, or forgotten with the partial rotary positions (Phi-3).
FAULTS = {
    "llama": ["old_context_len"],  # 8192, whatever rope_scaling says
    "mistral": ["seq_length", "vocab_size", "window_size"],  # the sequence's length is the window's
    "mixtral": ["cp_comm_type", "moe_aux_loss_coeff", "vocab_size", "window_size"],
    "qwen2": [],
    "qwen3": ["max_position_embeddings", "seq_length"],
    "qwen3_moe": ["cp_comm_type", "max_position_embeddings", "seq_length", "window_size"],
    "nemotron": ["vocab_size"],
    "phi3": ["cp_comm_type", "rotary_percent", "seq_length", "vocab_size", "window_size"],
}
# Importers that know only the grouped experts of Transformer Engine: without it they leave all experts as they are.
GROUPED = ("qwen3_moe",)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """NAME-teacher, NAME-student and NAME-plan.json for each of NAMES, FAMILY-import, and tokens.npy."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        teacher = contract.make(folder / f"{name}-teacher", name)
        plan = contract.plan_of(from_hf(teacher), contract.everything())
        plan.save(folder / f"{name}-plan.json")
        prune(teacher, plan, folder / f"{name}-student")
    for family in HERE:
        contract.make(folder / f"{family}-import", f"{family}-own", **IMPORTED.get(family, {}))
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 509, (2, 24)))
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """One torchrun for all families and layouts."""
    out = tmp_path_factory.mktemp("world2")
    run_ranks(2, WORKER, models, out)
    return out


def loaded(folder):
    """transformers' model of a folder, fp32; nothing in it may be missing, surplus or of another shape."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def tokens_of(folder):
    return np.load(folder / "tokens.npy")


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)


# -- folder to folder ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_names_and_count_are_transformers(name, models):
    source = HFSource(models / f"{name}-teacher")
    model = loaded(models / f"{name}-teacher")
    shapes = source.architecture.shapes()
    found = {}
    for hf, parts in source.family.hf_tensors(source.architecture).items():
        found[hf] = source.family.stored_shape(hf, [shapes[part] for part in parts])
    theirs = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    assert found == {hf: tuple(tensor.shape) for hf, tensor in theirs.items()}
    assert source.architecture.parameters() == sum(tensor.numel() for tensor in theirs.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_is_slicing_by_hand(name, models):
    """The student's tensors, and its logits, which are those of transformers' model of sizes written by hand."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    teacher, student = models / f"{name}-teacher", models / f"{name}-student"
    sliced = contract.slice_by_hand(raw_tensors(teacher), contract.everything(), contract.dtype_of(name))
    assert_same_bits(raw_tensors(student), sliced)
    config = AutoConfig.from_pretrained(teacher)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 3, 41, 50
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, HEAD_DIM
    if name.startswith(("mixtral", "qwen3_moe", "gpt_oss", "deepseek")):
        config.num_experts_per_tok = 2
    if name.startswith("deepseek"):
        config.num_key_value_heads, config.head_dim, config.first_k_dense_replace = 4, contract.latents.ROTARY, 1
        config.n_routed_experts, config.moe_intermediate_size, config.kv_lora_rank = 3, 50, 14
        config.q_lora_rank = 15 if config.q_lora_rank else None
    if name.startswith(("mixtral", "gpt_oss")):
        config.num_local_experts = 3
    if name.startswith("qwen3_moe"):
        config.num_experts, config.moe_intermediate_size = 3, 50
        config.mlp_only_layers = [1] if config.mlp_only_layers else []
    elif name.startswith(("ministral", "qwen", "smollm3", "gpt_oss", "gemma")):
        config.layer_types = [config.layer_types[layer] for layer in contract.CUT_LAYERS]
    if name.startswith("smollm3"):
        config.no_rope_layers = [config.no_rope_layers[layer] for layer in contract.CUT_LAYERS]
    by_hand = AutoModelForCausalLM.from_config(config).eval()
    state = {hf: torch.from_numpy(bits.view(np.float32).copy()) for hf, bits in sliced.items()}
    by_hand.load_state_dict(state, strict=not config.tie_word_embeddings)
    tokens = tokens_of(models)
    assert np.array_equal(logits(loaded(student), tokens), logits(by_hand, tokens))


@pytest.mark.parametrize("name", NAMES)
def test_shards_hold_the_same_bits(name, tmp_path):
    """In bf16: a fused tensor's parts lie one after another, whole, in one of the shards."""
    teacher = contract.make(tmp_path / "t", name, dtype="bfloat16")
    plan = contract.plan_of(from_hf(teacher), contract.everything())
    student = prune(teacher, plan, tmp_path / "s", shard_size=20_000)
    assert len(list(student.glob("*.safetensors"))) > 1
    dtype = contract.dtype_of(name, ml_dtypes.bfloat16)
    assert_same_bits(raw_tensors(student), contract.slice_by_hand(raw_tensors(teacher), contract.everything(), dtype))


# -- what is exact ---------------------------------------------------------------------------------------------
EXACT = {family.model_type: family.exact_axes for family in FAMILIES}
LACKING = {("qwen3_moe-own", "ffn")}  # all its layers are mixtures
CUTS = [(name, axis) for name in NAMES for axis in sorted(EXACT[name.split("-")[0]] - {"vocab"})]
CUTS = [cut for cut in CUTS if cut not in LACKING]


@pytest.mark.parametrize(("name", "axis"), CUTS)
def test_exact_axes_are_exact(name, axis, models, tmp_path):
    """Units that write nothing go without changing a logit (2407.14679, section 2)."""
    teacher = contract.make(tmp_path / "t", name)
    tensors = {hf: bits.view(np.float32) for hf, bits in raw_tensors(teacher).items()}
    keep = contract.silenced(tensors, axis)
    save_tensors(teacher, tensors)
    student = prune(teacher, contract.plan_of(from_hf(teacher), keep), tmp_path / "s")
    before, after = (logits(loaded(folder), tokens_of(models)) for folder in (teacher, student))
    assert before.std() > 0.1
    assert np.abs(after - before).max() < LOGITS_PICO_FP32
    assert HFSource(student).architecture.parameters() < HFSource(teacher).architecture.parameters()


@pytest.mark.parametrize("name", NAMES)
def test_hidden_is_not_exact(name, models, tmp_path):
    """A channel that is zero everywhere still counts in the norms' denominator."""
    teacher = contract.make(tmp_path / "t", name)
    tensors = {hf: bits.view(np.float32) for hf, bits in raw_tensors(teacher).items()}
    for hf, tensor in tensors.items():
        if hf.split(".")[-2] in ("o_proj", "down_proj", "w2"):
            tensor[:5] = 0
        elif ".experts.down_proj" in hf:  # gpt-oss's
            tensor[..., :5] = 0
        elif hf in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor[:, :5] = 0
    save_tensors(teacher, tensors)
    keep = contract.nothing() | {"hidden": list(range(5, HIDDEN))}
    student = prune(teacher, contract.plan_of(from_hf(teacher), keep), tmp_path / "s")
    before, after = (logits(loaded(folder), tokens_of(models)) for folder in (teacher, student))
    assert "hidden" not in EXACT[name.split("-")[0]]
    assert np.abs(after - before).max() > 100 * LOGITS_PICO_FP32


@pytest.mark.parametrize("name", NAMES)
def test_order_changes_nothing(name, models, tmp_path):
    """Neurons, heads within their groups, groups with their heads, and experts, in another order in each layer."""
    teacher = models / f"{name}-teacher"
    keep, random = contract.nothing(), np.random.default_rng(5)
    for layer in range(DEPTH):
        groups = random.permutation(GROUPS)
        keep["query_groups"][layer] = list(groups)
        keep["heads"][layer] = [3 * g + i for g in groups for i in random.permutation(3)]
        keep["ffn"][layer] = list(random.permutation(FFN))
        keep["experts"][layer] = list(random.permutation(4))
        keep["expert_ffn"][layer] = {e: list(random.permutation(FFN)) for e in range(4)}
    tensors = {hf: bits.view(np.float32) for hf, bits in raw_tensors(teacher).items()}
    shuffled = contract.make(tmp_path / "s", name)
    save_tensors(shuffled, {n: np.ascontiguousarray(t) for n, t in contract.slice_by_hand(tensors, keep).items()})
    before, after = (logits(loaded(folder), tokens_of(models)) for folder in (teacher, shuffled))
    assert np.abs(after - before).max() < LOGITS_PICO_FP32


# -- NeMo's own class, whole and split --------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "split"])
@pytest.mark.parametrize("name", NEMO_NAMES)
def test_megatron_has_the_folders_bits_and_transformers_logits(name, kind, models, results):
    result = json.loads((results / f"{name}-{kind}.json").read_text())
    assert (result["teacher"], result["student"]) == ([], [])
    found = np.load(results / f"{name}-{kind}.npz")
    for model in ("teacher", "student"):
        expected = logits(loaded(models / f"{name}-{model}"), tokens_of(models))
        assert expected.std() > 0.1
        assert np.abs(found[model] - expected).max() < LOGITS_PICO_FP32, model
        assert (found[model].argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NEMO_NAMES)
def test_nemo_loads_the_students_context(name, models, results):
    """By itself, with the activation that transformers computes."""
    result = json.loads((results / f"{name}-split.json").read_text())
    config = read_config(models / f"{name}-student")
    function = {"relu2": "squared_relu"}.get(config["hidden_act"], config["hidden_act"])
    assert result["context"] == [function, 41, HEAD_DIM, from_hf(config).tied_embeddings]


UNSAID = ("_name_or_path", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version")
UNSAID += ("max_window_layers", "no_rope_layer_interval")  # of a window not in use; no_rope_layers says it


@pytest.mark.slow
@pytest.mark.parametrize("name", NEMO_NAMES)
def test_a_nemo_checkpoint_is_the_folder_again(name, models, results, tmp_path):
    """Tensors bit by bit, under their Hugging Face names; of the config all that is not about tokens or files."""
    from transformers import AutoConfig

    from nemo_minitron.pruning import write_weights
    from nemo_minitron.pruning.convert import identity
    from nemo_minitron.sources.checkpoint import CheckpointSource

    for model in ("teacher", "student"):
        source, folder = CheckpointSource(results / f"{name}-{model}"), models / f"{name}-{model}"
        assert source.architecture == from_hf(folder)
        write_weights(source, identity(source.architecture), tmp_path, source.config)
        assert_same_bits(raw_tensors(tmp_path), raw_tensors(folder))
        theirs = AutoConfig.from_pretrained(folder).to_dict()
        ours = AutoConfig.for_model(**written_config(source.config)).to_dict()
        differing = {key for key in theirs if ours.get(key, "absent") != theirs[key]}
        assert differing - set(UNSAID) == set(), {key: (ours.get(key), theirs[key]) for key in differing}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEMO_NAMES)
def test_a_trained_student_is_exported(name, models, results, tmp_path):
    """`distill`'s last step: the checkpoint's weights in a folder like the student's, which transformers loads."""
    from nemo_minitron.commands.distill import export_student

    base = models / f"{name}-student"
    (tmp_path / "trained").symlink_to(results / f"{name}-student")
    (tmp_path / "last.json").write_text(json.dumps({"checkpoint": "trained"}))
    exported = export_student(tmp_path, HFSource(base), tmp_path / "exported")
    assert_same_bits(raw_tensors(exported), raw_tensors(base))
    assert read_config(exported) == read_config(base)
    assert read_config(exported)["head_dim"] == HEAD_DIM
    assert type(loaded(exported)).__name__ == read_config(base)["architectures"][0]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAULTS)
def test_nemos_importer_agrees_where_it_is_right(family, results):
    """All tensors (but `GROUPED`), of models that it can read; `FAULTS` says which fields of the config are wrong."""
    result = json.loads((results / f"{family}-import.json").read_text())
    assert result["config"] == FAULTS[family]
    assert bool(result["tensors"]) == (family in GROUPED)
    assert all(".experts." in name for name in result["tensors"]), result
