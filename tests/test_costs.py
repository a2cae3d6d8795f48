"""Memory of training, by hand and against sums over all ranks; against Megatron itself: test_costs_megatron.py."""

import itertools

import pytest
from test_architecture import mixed, of_table, smollm2

from nemo_minitron.costs import activations, parameters_by_stage, stage_layers, training_memory
from nemo_minitron.errors import InputError
from nemo_minitron.job import Layout

ONE = Layout()
TOKENS = {"batch": 2, "context": 10}


def test_one_process_by_hand():
    student, teacher = smollm2(ffn_hidden_size=1024), smollm2()
    found = training_memory(student, ONE, **TOKENS, teacher=teacher)
    count = student.parameters()
    layer = 4 * 576 + (9 + 2 * 3 + 9) * 64 + 3 * 1024
    values = 30 * layer + 3 * 49_152  # the student's logits, their gradient, the teacher's logits
    assert found == {
        "weights": 2 * count,
        "gradients": 4 * count,
        "optimizer": 12 * count,
        "teacher": 2 * teacher.parameters(),
        "activations": 2 * 10 * 2 * values,
    }
    alone = training_memory(student, ONE, **TOKENS, precision="fp32")
    assert alone["optimizer"] == 8 * count  # fp32 weights are their own master copy
    assert alone["teacher"] == 0
    assert alone["activations"] == 2 * 10 * 4 * (values - 49_152)


def test_the_distributed_optimizer_spreads_over_data_and_context_ranks():
    a = smollm2()
    spread = training_memory(a, Layout(dp=4, cp=2), **TOKENS)
    whole = training_memory(a, Layout(dp=4, cp=2), **TOKENS, distributed_optimizer=False)
    assert spread["optimizer"] == whole["optimizer"] // 8 == 12 * a.parameters() // 8
    assert (spread["weights"], spread["gradients"]) == (whole["weights"], whole["gradients"])
    assert spread["activations"] == training_memory(a, ONE, **TOKENS)["activations"] // 2


@pytest.mark.parametrize(
    "layout", [Layout(tp=3), Layout(pp=5), Layout(pp=2, vp=3), Layout(tp=3, pp=3, first_stage=4, last_stage=6)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_all_ranks_together_hold_the_model(layout, tied):
    """Matrices once, what is replicated once a tensor-parallel rank, a tied embedding twice under stages."""
    a = smollm2(tied_embeddings=tied)
    replicated = (layout.tp - 1) * 61 * 576
    second = a.vocab_size * a.hidden_size if tied and layout.pp > 1 else 0
    held = sum(dense for dense, _ in parameters_by_stage(a, layout)) * layout.tp
    assert held == a.parameters() + replicated + second


def test_experts_are_spread_over_their_own_ranks():
    a = mixed(num_attention_heads=8, num_query_groups=4)
    layout = Layout(tp=2, dp=2, ep=4, etp=1)
    experts = a.parameters() - a.replace(num_moe_experts=2, moe_router_topk=2).parameters() - 2 * 2 * 576
    ((dense, expert),) = parameters_by_stage(a, layout)
    assert expert == 2 * experts // 4  # four experts in two layers, one on a rank
    ((whole, all_experts),) = parameters_by_stage(a, ONE)
    assert (whole + all_experts, all_experts) == (a.parameters(), 2 * experts)
    memory = training_memory(a, layout, **TOKENS)
    assert memory["optimizer"] == dense * 12 // 2 + expert * 12  # an expert lies on one rank alone


def test_activations_of_a_mixture_by_hand():
    # two experts, each with a token in and out; the shared one, and its output in front of its gate
    mixture = 2 * (3 * 320 + 2 * 576) + 3 * 448 + 576
    (dense,) = activations(smollm2(num_layers=6), ONE, **TOKENS)
    assert activations(mixed(), ONE, **TOKENS) == [dense + 2 * 10 * 2 * 2 * (mixture - 3 * 1536)]


def test_sequence_parallelism_and_recomputation():
    a = smollm2(tied_embeddings=False)
    rest, vocabulary = 24 * 64 + 3 * 1536, 2 * 49_152
    by_hand = {
        (False, "none"): 30 * (4 * 576 + rest / 3) + vocabulary / 3,
        (True, "none"): 30 * (4 * 576 + rest) / 3 + vocabulary / 3,
        (True, "selective"): 30 * (2 * 576 + rest - 1536) / 3 + vocabulary / 3,
        (True, "full"): 30 * 576 / 3 + (4 * 576 + rest) / 3 + vocabulary / 3,
    }
    for (sp, recompute), values in by_hand.items():
        assert activations(a, Layout(tp=3, sp=sp), **TOKENS, recompute=recompute) == [round(2 * 10 * 2 * values)]


def test_stages_hold_as_many_micro_batches_as_the_schedule():
    """1F1B: the first stage has all stages' number under way; interleaved: Megatron's warm-up and one."""
    a = smollm2()
    layer, vocabulary = 4 * 576 + 24 * 64 + 3 * 1536, 2 * 49_152
    assert activations(a, Layout(pp=2), **TOKENS) == [40 * 15 * layer * 2, 40 * (15 * layer + vocabulary)]
    assert activations(a, Layout(pp=2), **TOKENS, micro_batches=1)[0] == 40 * 15 * layer
    chunk = 5 * layer  # three virtual stages a stage: 2 + 2 * 2 + 1 chunks under way on the first
    assert activations(a, Layout(pp=2, vp=3), **TOKENS) == [40 * 7 * chunk, 40 * (5 * chunk + vocabulary)]


@pytest.mark.parametrize("layout", [Layout(pp=5), Layout(pp=2, vp=3), Layout(pp=3, first_stage=7)])
def test_every_layer_has_one_stage(layout):
    if layout.first_stage:
        with pytest.raises(InputError):
            layout.check(smollm2())
        layout = Layout(pp=3, first_stage=8)
    stages = stage_layers(30, layout)
    assert sorted(itertools.chain(*stages)) == list(range(30))
    assert stages[0][0] == 0
    assert stages[-1][-1] == 29


def test_the_stage_that_needs_most_is_told():
    llama = of_table("llama-3.1-8b")
    stages = parameters_by_stage(llama, Layout(tp=8, pp=4))
    assert training_memory(llama, Layout(tp=8, pp=4), batch=1, context=4096)["weights"] == 2 * stages[0][0]
    assert training_memory(llama, Layout(tp=8, pp=4), batch=1, context=0)["weights"] == 2 * stages[-1][0]  # final norm


def test_refusals():
    with pytest.raises(InputError, match="recompute 'ful' is unknown; did you mean 'full'"):
        training_memory(smollm2(), ONE, **TOKENS, recompute="ful")
    with pytest.raises(InputError, match="precision 'fp8' is unknown"):
        training_memory(smollm2(), ONE, **TOKENS, precision="fp8")
