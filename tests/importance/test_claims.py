"""A module that no estimator claims is an error, on any model: its rows of the scores would be zeros."""

import re

import bare_models
import pytest
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mamba_mixer import MambaMixer
from torch import nn

from nemo_minitron.errors import InputError
from nemo_minitron.importance import Estimator, Watch, estimate, estimator
from nemo_minitron.importance.registry import REGISTRY, check_claimed

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def registry(monkeypatch):
    """Without the estimators of Mamba; a test's own go with it."""
    others = {kind: classes for kind, classes in REGISTRY.items() if not kind.__name__.startswith(("Mamba", "Hybrid"))}
    monkeypatch.setattr("nemo_minitron.importance.registry.REGISTRY", others)


class Mixing(nn.Module):
    """A layer's MLP of somebody's own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(48, 48))

    def forward(self, x):
        return self.inner(x), None


def with_own_mlp():
    model = bare_models.build("llama")[0]
    model.decoder.layers[2].mlp = Mixing()
    return model


@pytest.mark.parametrize("axes", [None, ("ffn",), ("layers",)])
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: bare_models.build("hybrid")[0], "the block of layers has a (MambaStack|HybridStack), which no"),
        (with_own_mlp, "layer 2 has a Mixing, which no estimator claims"),
    ],
)
def test_what_no_estimator_claims_is_refused(made, words, axes, registry):
    with pytest.raises(InputError, match=words) as refusal:
        estimate(made(), [bare_models.tokens(2)], axes=axes)
    assert "legal are Attention, MLASelfAttention, MLP, MoELayer" in str(refusal.value)


def test_each_part_of_a_hybrid_is_asked_for(registry):
    """The block with its final norm, the kind of layer, the mixer inside."""
    block = bare_models.build("hybrid")[0].decoder
    for kind, place in (
        (block, "the block of layers"),
        (block.layers[0], "layer 0"),
        (block.layers[0].mixer, "layer 0"),
    ):
        with pytest.raises(InputError, match=re.escape(f"{place} has a {type(kind).__name__}, which no")):
            check_claimed(block)
        estimator(type(kind))(type("Own", (Estimator,), {"axis": "own"}))
    check_claimed(block)


@pytest.mark.parametrize("kind", list(bare_models.KINDS))
def test_every_kind_of_model_is_claimed(kind):
    check_claimed(bare_models.build(kind)[0].decoder)


def test_an_estimator_is_called_for_every_layer_of_its_kind(registry):
    """The mixer lies in no TransformerLayer; layers 0 and 3 have one."""
    model = bare_models.build("hybrid")[0]
    for kind in (type(model.decoder), MambaLayer):
        estimator(kind)(type("Nothing", (Estimator,), {"axis": "nothing", "watch": lambda *_: None}))

    @estimator(MambaMixer)
    class Mixed(Estimator):
        axis = "mixed"

        def watch(self, module, layer, architecture):
            return Watch(layer, module.out_proj, lambda linear, given, output: given)

    scores = estimate(model, [bare_models.tokens(2)], axes=("mixed",))["mixed"]
    assert scores.shape == (4, 48)
    assert [bool(row.any()) for row in scores] == [True, False, False, True]
