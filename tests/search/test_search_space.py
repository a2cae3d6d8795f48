"""Enumeration against brute force, costs against Architecture's own."""

from fractions import Fraction

import numpy as np
import pytest
from spaces import MIXTURE, NEMOTRON, PICO, SPACE_4B, SPACE_8B, brute_force, lengths, shapes_of
from test_architecture import mixed, of_table, smollm2

from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError
from nemo_minitron.search import Divisors, make_space, parse
from nemo_minitron.search.formula import Formula

COSTS = {
    "parameters": lambda a: a.parameters(),
    "without embeddings": lambda a: a.parameters(embeddings=False),
    "active": lambda a: a.parameters(active=True),
    "memory": lambda a: a.memory(batch=3, context=70, weights="fp8", kv_cache="bf16"),
    "FLOPs": lambda a: a.flops_per_token(70),
}
WINDOWED = smollm2(num_layers=6, attention_window=40, window_attn_skip_freq=(1, 1, 0) * 2)
WHOLE = {name: (1, cut.length(PICO)) for name, cut in AXES.items() if cut.length(PICO)}


@pytest.mark.parametrize("rows", [1 << 20, 7])
def test_every_legal_shape_comes_once(rows):
    """All sizes of all axes but the vocabulary: 4 * 12 * 20 * 8 * 4 combinations, of which many split a group."""
    bounds = {name: ends for name, ends in WHOLE.items() if name != "vocab"}
    space = make_space(PICO, bounds=bounds, divisors=Divisors(of={"hidden": 3, "ffn": 4}))
    sizes = {name: range(1, high + 1) for name, (_, high) in bounds.items()}
    sizes |= {"hidden": range(3, 13, 3), "ffn": range(4, 21, 4)}
    assert space.combinations == 4 * 4 * 5 * 8 * 4
    found = sorted(shapes_of(space, rows))
    assert found == sorted(lengths(shape, space.axes) for _, shape in brute_force(PICO, sizes))
    assert len(found) == len(set(found)) < space.combinations


def test_heads_go_with_their_groups():
    space = make_space(PICO, bounds={"query_groups": (1, 4)}, keep={"layers": 4, "hidden": 12, "ffn": 20})
    assert space.axes == ("layers", "hidden", "ffn", "heads", "query_groups")
    assert [shape[3:] for shape in shapes_of(space)] == [(2, 1), (4, 2), (6, 3), (8, 4)]


@pytest.mark.parametrize(("text", "count"), [(SPACE_8B, 160), (SPACE_4B, 240)])
def test_the_papers_spaces(text, count):
    space = make_space(NEMOTRON, lists=parse.lists(text))
    shapes = list(shapes_of(space))
    assert space.combinations == len(shapes) == count  # no multiple is above 24,576, none is broken
    assert all(ffn / hidden in (2.5, 3, 3.5, 4) for _, hidden, ffn, _ in shapes)


def test_multiples_that_are_no_sizes_go():
    lists = {"hidden": [7, 8, 12], "ffn": [Fraction(3, 2), Fraction(2)]}
    assert list(shapes_of(make_space(PICO, lists=lists))) == [(7, 14), (8, 12), (8, 16), (12, 18)]  # 24 is above 20
    legal = make_space(PICO, lists=lists, divisors=Divisors(of={"ffn": 4}))
    assert list(shapes_of(legal)) == [(8, 12), (8, 16)]


@pytest.mark.parametrize(
    ("source", "axes"),
    [
        (NEMOTRON, ("layers", "hidden", "ffn", "heads", "query_groups", "vocab")),
        (smollm2(attention_window=40), ("layers", "heads")),
        (WINDOWED, ("hidden", "heads")),
        (smollm2(), ("layers", "hidden", "ffn", "heads")),
        (smollm2(qkv_bias=True, attention_output_bias=True, mlp_bias=True), ("layers", "hidden", "ffn", "heads")),
        (of_table("qwen3-8b"), ("layers", "hidden", "ffn", "query_groups", "heads", "vocab")),
        (PICO, ("heads",)),
        (MIXTURE, ("layers", "hidden", "heads", "experts", "expert_ffn", "shared_expert_ffn")),
        (mixed(), ("hidden", "ffn", "experts", "expert_ffn", "shared_expert_ffn")),
    ],
)
@pytest.mark.parametrize("cost", COSTS)
def test_formulas_are_the_architectures(source, axes, cost):
    """On random shapes, in whole numbers."""
    generator = np.random.default_rng(5)
    columns = {name: generator.integers(1, AXES[name].length(source) + 1, 40) for name in axes}
    if "experts" in axes:
        columns["experts"] = np.maximum(columns["experts"], source.moe_router_topk)
    if "heads" in axes:
        groups = columns.get("query_groups", np.full(40, source.num_query_groups))
        columns["heads"] = groups * generator.integers(1, source.heads_per_group + 1, 40)
    found = Formula(COSTS[cost], source, axes)(columns).tolist()
    for i, value in enumerate(found):
        sizes = {AXES[name].size: int(column[i]) for name, column in columns.items()}
        assert value == COSTS[cost](source.replace(**sizes))


def test_where_only_some_layers_have_a_window_a_number_of_layers_counts_none():
    """Which ones stay is not known, so a shape costs at most so much."""
    columns = {"layers": np.array([2, 6])}
    for cost in (COSTS["memory"], COSTS["FLOPs"]):
        whole = [cost(smollm2(num_layers=layers)) for layers in (2, 6)]
        assert Formula(cost, WINDOWED, ("layers",))(columns).tolist() == whole
        assert cost(WINDOWED) < whole[1]


def test_a_cost_of_another_form_is_not_taken_for_one():
    with pytest.raises(ValueError, match="no sum of products"):
        Formula(lambda a: a.hidden_size**2, PICO, ("hidden",))


def test_default_space():
    space = make_space(smollm2())
    assert space.sizes == {
        "layers": tuple(range(15, 31)),
        "hidden": (320, 384, 448, 512, 576),  # half, 288, is no multiple of 64
        "ffn": tuple(range(768, 1537, 64)),
    }
    assert make_space(PICO).sizes["hidden"] == tuple(range(6, 13))  # steps of 64 would leave nothing
    assert set(make_space(MIXTURE).sizes) == {"layers", "hidden", "experts", "expert_ffn", "shared_expert_ffn"}
    ffn = make_space(NEMOTRON).sizes["ffn"]
    assert (ffn[0], ffn[1], ffn[-1]) == (12_288, 12_544, 24_576)  # wider models have wider steps
    assert make_space(MIXTURE.replace(num_moe_experts=128)).sizes["experts"] == (64, 80, 96, 112, 128)
    assert "layers" not in make_space(mixed()).sizes  # which layers are mixtures is not their number


@pytest.mark.parametrize(
    ("divisors", "hidden", "ffn"),
    [
        ("", (448, 512, 575), (1000, 1024, 1088)),
        ("fp8", tuple(range(448, 575, 16)), tuple(range(1008, 1089, 16))),
        ("128", (512,), (1024,)),
        ("tp=17", (448, 512, 575), (1088,)),
        ("tp=7", (448, 512, 575), tuple(range(1001, 1089, 7))),  # no multiple of 7 is one of 64 there
        ("ffn=500", (448, 512, 575), (1000,)),
    ],
)
def test_divisors(divisors, hidden, ffn):
    """Bounds are tried themselves where they are legal; tp forbids and leaves the steps as they are."""
    bounds = {"hidden": (448, 575), "ffn": (1000, 1088)}
    space = make_space(smollm2(), bounds=bounds, divisors=parse.divisors(divisors))
    assert (space.sizes["hidden"], space.sizes["ffn"]) == (hidden, ffn)


def test_divisors_of_heads():
    llama = of_table("llama-3.1-8b")
    assert Divisors(every=64).hard(llama, "heads") == 1  # their dimension, 128, is one already
    assert Divisors(every=256, tp=3).hard(llama, "heads") == 6
    assert Divisors(every=16).hard(smollm2(head_dim=24), "query_groups") == 2
    assert Divisors(every=16, tp=4).hard(llama, "ffn") == 16
    assert Divisors(every=16, tp=4, local=True).hard(llama, "ffn") == 64  # 16 on each rank
    assert Divisors(every=16, tp=4, local=True).hard(llama, "hidden") == 16  # whole on each
    assert Divisors(every=16, tp=3, local=True).hard(smollm2(head_dim=24), "heads") == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lists": {"layers": [29, 31]}}, "layers=31 is not legal; legal are 1 to 30, the nearest is 30"),
        ({"bounds": {"ffn": (10, 1600)}}, "ffn=10:1600 is not legal; bounds lie within 1:1536"),
        ({"bounds": {"ffn": (20, 10)}}, "the lower one first"),
        ({"bounds": {"experts": (1, 2)}}, "the model has no 'experts' to cut; it has layers, hidden, ffn"),
        ({"bounds": {"fnn": (1, 2)}}, "no axis 'fnn'"),
        ({"lists": {"hidden": [Fraction(2)]}}, "'hidden' cannot be a multiple of hidden"),
        ({"lists": {"ffn": [Fraction(2), 3]}}, "mixes sizes with multiples"),
        ({"lists": {"ffn": [100]}, "divisors": Divisors(64)}, "no size of 'ffn' from 100 to 100 is a multiple of 64"),
        ({"keep": {"ffn": 1537}}, "ffn=1537 is not legal"),
        ({"keep": {"ffn": 100}, "bounds": {"ffn": (1, 2)}}, "'ffn' is given twice"),
        ({"bounds": {"vocab": (1, 49_152), "ffn": (1, 1536)}, "divisors": Divisors(1)}, "narrow it to at most"),
    ],
)
def test_refused(options, words):
    with pytest.raises(InputError, match=words):
        make_space(smollm2(), **options)


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (parse.sizes, "ffn", "'ffn' in --keep names no axis and size"),
        (parse.sizes, "ffn=many", "'ffn=many' in --keep is not a size"),
        (parse.sizes, "ffn=1,ffn=2", "'ffn' is in --keep twice"),
        (parse.bounds, "ffn=3", "has no two ends"),
        (parse.lists, "ffn=2.5y", "'ffn=2.5y' in --space is not a size"),
        (parse.divisors, "sixty", "'sixty' in --divisors is not a size"),
        (parse.divisors, "tp=0", "the divisor tp=0 is not legal"),
        (parse.tolerance, "five", "'five' is not a share"),
        (lambda text: parse.count(text, "--params"), "84X", "--params=84X is not a size; write for example 84M"),
        (lambda text: parse.size_in_bytes(text, "--memory"), "8GiX", "write for example 8GiB"),
    ],
)
def test_words_refused(read, text, words):
    with pytest.raises(InputError, match=words):
        read(text)


def test_words():
    assert parse.count("8.27B", "") == 8_270_000_000
    assert parse.count("84m", "") == 84_000_000
    assert (parse.size_in_bytes("8GiB", ""), parse.size_in_bytes("1.5 kB", "")) == (8 * 2**30, 1500)
    assert (parse.seconds("30ms", ""), parse.seconds("1.5", "")) == (0.03, 1.5)
    assert parse.tolerance("5%") == parse.tolerance("0.05") == 0.05
    assert parse.lists("layers=29, 30; ffn=2.5x") == {"layers": [29, 30], "ffn": [Fraction(5, 2)]}
    assert parse.divisors("fp8, tp=8,hidden=128") == Divisors(16, 8, {"hidden": 128}, local=True)
    assert parse.divisors("fp8=128") == Divisors(128, local=True)
    with pytest.raises(InputError, match="fp8=100 in --divisors is not a multiple of 16; the nearest is 96"):
        parse.divisors("fp8=100")


# -- sizes that every transformers loads ------------------------------------------------------------------------
LOADS = {"hidden_size": "num_attention_heads"}


def test_hidden_sizes_of_a_llama_are_multiples_of_its_heads():
    assert make_space(smollm2()).sizes["hidden"] == (320, 384, 448, 512, 576)
    assert make_space(smollm2(), loads=LOADS).sizes["hidden"] == (288, 360, 432, 504, 576)  # 72 is 8 x 9 heads
    large = smollm2().replace(hidden_size=4096, num_attention_heads=32, num_query_groups=8)
    assert make_space(large, loads=LOADS).sizes["hidden"] == make_space(large).sizes["hidden"]
    odd = smollm2().replace(hidden_size=3072, num_attention_heads=24, num_query_groups=8)
    assert make_space(odd, loads=LOADS).sizes["hidden"] == tuple(range(1536, 3073, 192))


def named_shapes(space):
    return [dict(zip(block, row, strict=True)) for block in space.blocks() for row in zip(*block.values(), strict=True)]


@pytest.mark.parametrize("bounds", [{"heads": (3, 9)}, {"heads": (3, 9), "hidden": (440, 576)}])
def test_each_shape_loads_where_heads_vary_too(bounds):
    shapes = named_shapes(make_space(smollm2(), bounds=bounds, loads=LOADS))
    assert {shape["heads"] for shape in shapes} == {3, 6, 9}
    assert all(shape["hidden"] % shape["heads"] == 0 for shape in shapes)
    assert any(s["hidden"] % s["heads"] for s in named_shapes(make_space(smollm2(), bounds=bounds)))


def test_what_is_asked_for_by_name_stays():
    listed = make_space(smollm2(), lists={"hidden": (448, 512), "ffn": (1024,)}, loads=LOADS)
    assert [shape["hidden"] for shape in named_shapes(listed)] == [448, 512]
    kept = make_space(smollm2(), lists={"ffn": (1024,)}, keep={"hidden": 448}, loads=LOADS)
    assert [shape["hidden"] for shape in named_shapes(kept)] == [448]
    bounded = make_space(smollm2(), bounds={"hidden": (445, 449)}, lists={"ffn": (1024,)}, loads=LOADS)
    assert {shape["hidden"] for shape in named_shapes(bounded)} == {445, 446, 447, 448, 449}  # none of them loads


def test_a_mixtures_widths_are_multiples_of_8():
    loads = {"hidden_size": 8, "moe_ffn_hidden_size": 8}
    small = MIXTURE.replace(hidden_size=48, moe_ffn_hidden_size=40)
    space = make_space(small, loads=loads)
    assert {axis: all(s % 8 == 0 for s in space.sizes[axis]) for axis in ("hidden", "expert_ffn")} == {
        "hidden": True, "expert_ffn": True,
    }  # fmt: skip
    assert len(space.sizes["hidden"]) > 1
