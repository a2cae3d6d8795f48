"""NeMo's own importer, trainer and exporter around this package, in one process of a user's script."""

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
from nemo_minitron.pruning.tensors import source_digest, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    texts = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
    pico_llama(folder / "pico", dtype="float32", vocab_size=512)
    save_tokenizer(folder / "pico", texts, size=512)  # NeMo exports as many rows as the tokenizer has
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    script = Path(__file__).parent / "nemo_script.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return folder, json.loads(result.removeprefix("RESULT"))


def same(a, b):
    return [
        name
        for name, shape in a.architecture.shapes().items()
        if not np.array_equal(a.read(name, whole(shape)), b.read(name, whole(shape)))
    ]


def test_reading_nemos_own_import_gives_the_folders_bits(run):
    from nemo_minitron.nemo.checkpoint import CheckpointSource

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
    from nemo_minitron.nemo.checkpoint import CheckpointSource

    folder, _ = run
    scores = Scores.load(folder / "pruned" / "scores.safetensors")
    plan = PrunePlan.load(folder / "pruned" / "plan.json")
    assert (scores.samples, scores.tokens) == (8, 8 * 32)
    assert np.array_equal(scores["norms"], Scores.load(folder / "scores.safetensors")["norms"])
    assert scores.model_digest == plan.model_digest == source_digest(HFSource(folder / "pico"))
    shutil.rmtree(folder / "by-hand", ignore_errors=True)
    prune(folder / "pico", plan, folder / "by-hand")
    cut = HFSource(folder / "by-hand")
    for student in ("pruned", "pruned-live"):
        assert same(CheckpointSource(folder / student / "student"), cut) == [], student


def test_nemos_own_exporter_writes_the_same_student(run):
    folder, _ = run
    exported = raw_tensors(folder / "exported")
    plan = PrunePlan.load(folder / "pruned" / "plan.json")
    shutil.rmtree(folder / "exported-by-hand", ignore_errors=True)
    prune(folder / "pico", plan, folder / "exported-by-hand")
    expected = raw_tensors(folder / "exported-by-hand")
    assert exported.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(exported[name], expected[name])] == []


def test_context_holds_no_foreign_class(run):
    from nemo_minitron.nemo.context import read_context

    folder, _ = run
    context = (folder / "pruned" / "student" / "context" / "io.json").read_text()
    assert "nemo_minitron" not in context
    fields = read_context(folder / "pruned" / "student" / "context").config
    assert fields["apply_rope_fusion"] is True  # Transformer Engine's default, which this machine cannot run
    assert fields["vocab_size"] == 512
