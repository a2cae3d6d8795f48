"""A distilled student in NeMo alone, on a GPU with Transformer Engine: nothing of this package is imported."""

import pytest
import torch
from command_line import compressed, exported_as_is, moved, plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: run it with make test-gpu on one")
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def test_nemo_alone_exports_and_trains_a_student(tmp_path):
    """As tests/cli/test_compress.py on a CPU, whose bound on two steps of Adam this is."""
    pytest.importorskip("transformer_engine")
    compressed(tmp_path, **SIZES)
    assert plain(tmp_path, "gpu") == []
    assert exported_as_is(tmp_path)
    assert {name: by for name, by in moved(tmp_path).items() if not 0 < by < 1e-3} == {}
