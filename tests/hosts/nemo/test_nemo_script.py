"""NeMo's own importer, trainer and exporter around this package, in one process of a user's scripts, the examples
among them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama, raw_tensors
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.sources.tensors import source_digest, whole

pytestmark = pytest.mark.slow
SIZES = {"num_layers": 5, "hidden_size": 40, "ffn_hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 3}
SIZES |= {"kv_channels": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    texts = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
    pico_llama(folder / "pico", dtype="float32", vocab_size=512)
    save_tokenizer(folder / "pico", texts, size=512)  # NeMo exports as many rows as the tokenizer has
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    script = Path(__file__).parent / "nemo_script.py"
    command = [sys.executable, str(script), str(folder), json.dumps(SIZES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return folder, json.loads(result.removeprefix("RESULT"))


def last(folder):
    (checkpoint,) = (folder / "distilled" / "checkpoints").glob("*-last")
    return checkpoint


def same(a, b):
    return [
        name
        for name, shape in a.architecture.shapes().items()
        if not np.array_equal(a.read(name, whole(shape)), b.read(name, whole(shape)))
    ]


def test_reading_nemos_own_import_gives_the_folders_bits(run):
    from nemo_minitron.sources.checkpoint import CheckpointSource

    folder, _ = run
    imported, original = CheckpointSource(folder / "nemo-teacher"), HFSource(folder / "pico")
    assert imported.architecture == original.architecture
    assert same(imported, original) == []
    for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert imported.config[key] == original.config[key], key


def test_hooks_change_nothing_and_go(run):
    _, result = run
    assert result["losses"][0] == result["losses"][1]
    assert result["hooks"] == 0


def test_nemos_models_answer_which_estimator_watches_what(run):
    _, result = run
    assert {"ffn", "ffn_pre_activation"} <= set(result["watched"]["MLP"])
    assert {"experts", "expert_ffn", "shared_expert_ffn"} <= set(result["watched"]["MoELayer"])
    assert {"q_latent", "kv_latent"} <= set(result["watched"]["MLASelfAttention"])
    assert "layers" in result["watched"]["TransformerLayer"]


def test_pruning_callback_leaves_scores_plan_and_a_students_checkpoint(run):
    from nemo_minitron.sources.checkpoint import CheckpointSource

    folder, _ = run
    scores = Scores.load(folder / "pruned" / "scores.safetensors")
    plan = PrunePlan.load(folder / "pruned" / "plan.json")
    assert (scores.samples, scores.tokens) == (8, 8 * 32)
    assert np.array_equal(scores["norms"], Scores.load(folder / "scores.safetensors")["norms"])
    assert scores.model_digest == plan.model_digest == source_digest(HFSource(folder / "pico"))
    for made in ("pruned", "pruned-live"):  # read from the teacher's checkpoint, and from the live model
        plan = PrunePlan.load(folder / made / "plan.json")
        shutil.rmtree(folder / "by-hand", ignore_errors=True)
        prune(folder / "pico", plan, folder / "by-hand")
        assert same(CheckpointSource(folder / made / "student"), HFSource(folder / "by-hand")) == [], made


def test_nemos_own_exporter_writes_the_same_student(run):
    folder, _ = run
    exported = raw_tensors(folder / "exported")
    plan = PrunePlan.load(folder / "pruned" / "plan.json")
    shutil.rmtree(folder / "exported-by-hand", ignore_errors=True)
    prune(folder / "pico", plan, folder / "exported-by-hand")
    expected = raw_tensors(folder / "exported-by-hand")
    assert exported.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(exported[name], expected[name])] == []


def test_contexts_hold_no_foreign_class(run):
    from nemo_minitron.sources.context import read_context

    folder, _ = run
    students = (folder / made / "student" for made in ("pruned", "pruned-live"))
    for checkpoint in (*students, last(folder), folder / "read"):
        for file in (checkpoint / "context").rglob("*"):
            assert file.is_dir() or b"nemo_minitron" not in file.read_bytes(), file
        fields = read_context(checkpoint / "context").config
        assert fields["apply_rope_fusion"] is True  # Transformer Engine's default, which this machine cannot run
        assert fields["vocab_size"] == 512


def test_connectors_read_through_a_plan_and_write_a_folder(run):
    from nemo_minitron.sources.checkpoint import CheckpointSource

    folder, _ = run
    shutil.rmtree(folder / "read-by-hand", ignore_errors=True)
    prune(folder / "pico", PrunePlan.load(folder / "pruned" / "plan.json"), folder / "read-by-hand")
    assert same(CheckpointSource(folder / "read"), HFSource(folder / "read-by-hand")) == []
    assert same(HFSource(folder / "written"), HFSource(folder / "read-by-hand")) == []
    tokenizers = [json.loads((folder / where / "tokenizer.json").read_text()) for where in ("pico", "written")]
    assert tokenizers[0]["model"] == tokenizers[1]["model"]


def test_the_examples_prune_and_distil(run):
    """Every tensor of the student that examples/nemo_prune.py cut was trained by examples/nemo_distill.py."""
    from nemo_minitron.sources.checkpoint import CheckpointSource

    folder, _ = run
    pruned, distilled = CheckpointSource(folder / "pruned-live" / "student"), CheckpointSource(last(folder))
    assert distilled.architecture == pruned.architecture
    assert set(same(pruned, distilled)) == set(pruned.architecture.shapes())
    scores = Scores.load(folder / "pruned-live" / "all.safetensors")
    assert {"l2,mean", "var,mean"} <= set(scores.criteria)
    assert scores.samples == 8


def test_nemo_loads_other_sizes_also_where_the_class_had_them_as_defaults(run):
    """Llama2Config7B was given two sizes; the other four are its defaults and stand in no file but model.yaml.

    Where `resize_context` sets only what is there already, num_layers comes back as 32.
    """
    assert run[1]["resized"] == ["Llama2Config7B", "Llama2Config7B", 4096, SIZES, SIZES]
