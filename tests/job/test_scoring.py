"""What the dry run says of scoring and of the least squares after a cut, against numbers by hand."""

import dataclasses

import pytest
from pico import pico_llama
from test_architecture import mixed, smollm2

from nemo_minitron.costs import forward_memory, gram_bytes
from nemo_minitron.job import Calibration, Cutting, Data, Job, Layout
from nemo_minitron.job.dry_run import describe
from nemo_minitron.job.scoring import (
    Refit,
    reconstruction_of,
    refit_of,
    rotation_flops,
    scoring_flops,
    scoring_memory,
    seconds_of,
    statistics_bytes,
)

ONE = Layout()
ROWS = Calibration(samples=6, sequence_length=20, batch_size=2, precision="bf16")
LAYER = 4 * 576 + (9 + 2 * 3 + 9) * 64 + 3 * 1536  # values of a token: residual stream and norms, attention, MLP
GRAM = 8 * (1536**2 + 576**2)  # bytes of a layer


def test_a_forward_pass_holds_weights_and_the_logits_or_one_layer():
    a, tokens = smollm2(), 2 * 10
    sizes = {"batch": 2, "context": 10}
    logits = {"bf16": 2 * 576 + (2 + 4) * 49_152, "fp32": 4 * 576 + 4 * 49_152}  # the loss is in fp32
    for precision, size in (("bf16", 2), ("fp32", 4)):
        found = forward_memory(a, ONE, **sizes, precision=precision)
        assert found == {"weights": size * a.parameters(), "activations": tokens * logits[precision]}
    narrow = a.replace(vocab_size=100)
    assert forward_memory(narrow, ONE, **sizes)["activations"] == tokens * 2 * LAYER
    assert forward_memory(a, Layout(cp=2), **sizes)["activations"] == tokens // 2 * logits["bf16"]
    split = forward_memory(a, Layout(tp=3, sp=True), **sizes)
    assert split["activations"] == tokens * (2 * 576 // 3 + 6 * 49_152 // 3)


def test_the_stage_that_needs_most_is_told():
    """Tied embeddings lie on both ends, and the logits on the last stage."""
    a = smollm2()
    found = forward_memory(a, Layout(pp=2), batch=2, context=10)
    half = (a.parameters() - 49_152 * 576 - 576) // 2
    assert found == {"weights": 2 * (half + 49_152 * 576 + 576), "activations": 20 * (2 * 576 + 6 * 49_152)}


def test_fp8_weights_have_one_copy():
    a = smollm2(head_dim=64, num_layers=2)
    matrices = 2 * ((9 + 2 * 3 + 9) * 64 * 576 + 3 * 1536 * 576)
    found = forward_memory(a, ONE, batch=2, context=10, precision="fp8-current")
    assert found["weights"] == 2 * a.parameters() + matrices


def test_the_re_fit_of_neurons_and_of_heads():
    a = smollm2()
    assert gram_bytes(a, ONE) == GRAM
    assert refit_of(a, smollm2(ffn_hidden_size=1024), ONE, 4.0) == Refit(1, 2 * 30 * 1536**2, 30 * GRAM)
    both = smollm2(ffn_hidden_size=1024, num_attention_heads=6, num_query_groups=2)
    assert refit_of(a, both, ONE, 4.0).products == 2 * 30 * (1536**2 + 576**2)
    assert refit_of(a, smollm2(num_layers=20, hidden_size=512), ONE, 4.0) == Refit()


def test_the_memory_of_gram_matrices_decides_the_passes():
    """As many as the stage itself makes."""
    from nemo_minitron.megatron.compensate import passes

    a, student = smollm2(), smollm2(ffn_hidden_size=1024)
    origins = [f"layers.{layer}.down.weight" for layer in range(30)]
    for memory, count in ((0.1, 8), (0.01, 30), (4.0, 1)):  # 4 layers, 1 and 30 at a time
        assert refit_of(a, student, ONE, memory).passes == count
        assert len(list(passes(a, origins, int(memory * 1e9), ONE))) == count
    assert refit_of(a, student, ONE, 0.1).memory == 4 * GRAM
    assert refit_of(a, student, ONE, 0.1, copies=2) == Refit(15, 2 * 30 * 1536**2, 2 * 2 * GRAM)  # 2 layers at a time
    assert len(list(passes(a, origins, int(0.1e9) // 2, ONE))) == 15
    assert (Cutting().gram_copies, Cutting(ridge="auto").gram_copies) == (1, 2)
    assert refit_of(a, student, Layout(pp=5), 4.0).memory == 6 * GRAM  # a stage has six layers


def test_the_re_fit_of_experts():
    """Each token goes to two of them."""
    a = mixed()
    found = refit_of(a, a.replace(moe_ffn_hidden_size=160), ONE, 4.0)
    assert found.products == 2 * 2 * 2 * 320**2  # two layers


def test_the_fit_of_mixtures_and_attention():
    """Two of six layers are mixtures; a token goes to two of three experts that stay. Attention is fitted in all."""
    a = mixed()
    student = a.replace(num_moe_experts=3, num_attention_heads=6, num_query_groups=3)
    attention, shared, expert = 6 * 2 * 576 * (6 + 3) * 64, 2 * 3 * 576 * 448, 3 * 576 * 320
    held = 4 * (student.parameters() + 4 * (attention + shared + 2 * 3 * expert))
    assert reconstruction_of(a, student, ONE, 1) == (held, 6 * (attention + shared + 2 * 2 * expert))
    assert reconstruction_of(a, student, Layout(ep=3, dp=3), 1)[0] < held
    assert reconstruction_of(a, a.replace(num_moe_experts=3), ONE, 1)[1] == 6 * (shared + 2 * 2 * expert)


def test_the_fit_of_mlps_as_a_whole():
    """An fp32 copy of the model with fewer neurons; gradients, two moments and the start of its MLPs."""
    a, student = smollm2(), smollm2(ffn_hidden_size=1024, num_layers=20)
    mlps = 30 * 3 * 576 * 1024
    held = 4 * (a.parameters() - 30 * 3 * 576 * 512 + 4 * mlps)
    assert reconstruction_of(a, student, ONE, 4) == (held, 4 * 6 * mlps)
    assert reconstruction_of(a, student, ONE, 0) == (0, 0)
    assert reconstruction_of(a, smollm2(hidden_size=512), ONE, 4) == (0, 0)
    assert reconstruction_of(a, student, Layout(tp=3), 4)[0] < held / 2.5


def test_flops():
    a, refit = smollm2(), Refit(passes=3, products=7)
    forward = a.flops_per_token(10)
    none = {"scores": 120 * forward, "re-fit": 0, "reconstruction": 0}
    assert scoring_flops(a, ROWS, refit) == none | {"re-fit": 120 * (3 * forward + 7)}
    taylor, magnitude = (dataclasses.replace(ROWS, method=method) for method in ("taylor", "magnitude"))
    assert scoring_flops(a, taylor, Refit()) == none | {"scores": 3 * 120 * forward}
    assert scoring_flops(a, magnitude, Refit()) == none | {"scores": 0}
    assert scoring_flops(a, ROWS, Refit(fits=2, fitting=9)) == none | {"reconstruction": 120 * (2 * forward + 9)}
    assert seconds_of({"scores": 989e12, "re-fit": 989e12}) == pytest.approx(2 / 0.4)


def test_statistics():
    """fp64, of two halves: neurons twice, heads and their channels, norms, layers, the stream's logarithms."""
    a = smollm2()
    units = 30 * (2 * 1536 + 9 + 576 + 1) + 61 * 576 + 31 * 2
    assert statistics_bytes(a, ROWS) == 16 * units
    assert statistics_bytes(a, dataclasses.replace(ROWS, criterion="l2,mean;var,mean")) == 16 * units * (1 + 3)
    assert statistics_bytes(a, dataclasses.replace(ROWS, axes=("hidden",))) == 16 * 61 * 576
    assert scoring_memory(a, ROWS, ONE)["statistics"] == 16 * units


def test_a_rotation_is_one_more_pass_and_a_product_a_norm(job):
    assert rotation_flops(job, smollm2()) == {}
    rows = dataclasses.replace(job, calibration=ROWS, cutting=Cutting(rotate=True))
    assert rotation_flops(rows, smollm2()) == {"rotation": 120 * (smollm2().flops_per_token(10) + 2 * 61 * 576**2)}


@pytest.fixture
def job(tmp_path):
    pico_llama(tmp_path / "teacher")
    return Job(name="pico", teacher=str(tmp_path / "teacher"), data=Data("a", "b"), keep={"ffn": 64})


def test_the_dry_run_says_it(job):
    text = describe(job)
    assert "memory of scoring, each rank:" in text
    assert "Gram matrices (re-fit)" in text
    assert "at the speed of training, which fp32 does not reach" in text
    assert "the re-fit reads the rows" not in text
    small = describe(dataclasses.replace(job, cutting=Cutting(memory=1e-6)))
    assert "the re-fit reads the rows 6 times; cutting.memory limits the layers of a pass" in small
    assert "reconstruct" not in text
    fitted = describe(dataclasses.replace(job, cutting=Cutting(reconstruct=2)))
    assert "  student (reconstruct) " in fitted
    assert "reconstruction " in fitted
    assert "gaps " not in fitted
    filled = describe(dataclasses.replace(job, keep={"layers": 4, "ffn": 64}, cutting=Cutting(fill_gaps=True)))
    assert ", gaps " in filled
    plain = describe(dataclasses.replace(job, cutting=Cutting(compensate=False)))
    assert "Gram matrices" not in plain
    taylor = describe(dataclasses.replace(job, calibration=Calibration(method="taylor")))
    assert "memory of scoring" not in taylor
    assert "FLOPs (scores " in taylor
