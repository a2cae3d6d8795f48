"""The backend is set up before any test module imports Megatron."""

import datetime

import pytest

import nemo_minitron.backend as backend

backend.setup()


@pytest.fixture(scope="module")
def one_process():
    """Megatron's groups of one process; other test files may have made them."""
    import bare_models
    import torch

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        wait = datetime.timedelta(seconds=60)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=wait)
    bare_models.start()
