"""Writing a live model as a NeMo checkpoint, for tests that read one."""


def save_checkpoint(chunks, checkpoint, config, **metadata):
    """As NeMo's strategy saves it: torch_dist weights, and the context that NeMo's own io writes. Collective."""
    import torch
    from megatron.core import dist_checkpointing
    from nemo.lightning.io.pl import TrainerContext

    from nemo_minitron.hosts.nemo.models import nemo_model
    from nemo_minitron.hosts.nemo.trainer import make_trainer
    from nemo_minitron.settings.layout import Layout

    if torch.distributed.get_rank() == 0:
        (checkpoint / "weights").mkdir(parents=True)
        context = TrainerContext(model=nemo_model(config), trainer=make_trainer(Layout(), "fp32"), extra={})
        context.io_dump(checkpoint / "context", yaml_attrs=["model"])
    torch.distributed.barrier()
    state = chunks[0].sharded_state_dict(prefix="module.", metadata={"singleton_local_shards": False, **metadata})
    dist_checkpointing.save({"state_dict": {}, "sharded_state_dict": state}, str(checkpoint / "weights"))
    torch.distributed.barrier()


def save_small(checkpoint):
    """As a training leaves one, of one small tensor and with a context that says nothing: for what looks at sizes."""
    import torch
    from torch.distributed import checkpoint as dcp

    weights = checkpoint / "weights"
    dcp.save({"w": torch.arange(1000.0)}, storage_writer=dcp.FileSystemWriter(weights), no_dist=True)
    torch.save({}, weights / "common.pt")
    (checkpoint / "context").mkdir()
    for file in (weights / "metadata.json", checkpoint / "context" / "io.json"):
        file.write_text("{}")
