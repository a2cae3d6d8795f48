"""Prunes a model in your own Bridge script, in any layout: torchrun examples/bridge_prune.py MODEL CORPUS OUT

MODEL is a Hugging Face folder. CORPUS is the prefix of Megatron's .bin/.idx files. The script leaves
OUT/scores.safetensors, OUT/plan.json and OUT/student, a checkpoint of Megatron-Bridge. Edit sizes and layout here.
"""

import sys

KEEP = {"ffn": 64, "layers": 3}  # axis -> the size that stays
BATCHES, LENGTH = 4, 32
LAYOUT = {"tensor_model_parallel_size": 1, "sequence_parallel": False, "pipeline_model_parallel_size": 1}


def main(model: str, corpus: str, out: str) -> None:
    from nemo_minitron.bridge import setup

    setup()  # imports Bridge; it changes nothing if CUDA and Transformer Engine are there
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training import config as bridge
    from megatron.bridge.training.pretrain import pretrain

    from nemo_minitron.bridge import Pruning

    provider = AutoBridge.from_hf_pretrained(model).to_megatron_provider(load_weights=True)
    provider.seq_length, provider.gradient_accumulation_fusion = LENGTH, False
    for name, value in LAYOUT.items():
        setattr(provider, name, value)
    config = bridge.ConfigContainer(
        model=provider,
        train=bridge.TrainingConfig(train_iters=1, micro_batch_size=1, global_batch_size=2),
        validation=bridge.ValidationConfig(skip_train=True, eval_iters=BATCHES),
        optimizer=bridge.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=0.0, use_distributed_optimizer=True),
        scheduler=bridge.SchedulerConfig(start_weight_decay=0.0, end_weight_decay=0.0),
        ddp=bridge.DistributedDataParallelConfig(use_distributed_optimizer=True),
        dataset=bridge.GPTDatasetConfig(
            random_seed=1234, seq_length=LENGTH, blend=([corpus], None), split="0,1,0", num_workers=0,
            reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, dataloader_type="single",
        ),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model),
        checkpoint=bridge.CheckpointConfig(save=None, load=None),
        logger=bridge.LoggerConfig(log_interval=1),
        dist=bridge.DistributedInitConfig(distributed_backend="nccl" if torch.cuda.is_available() else "gloo"),
    )  # fmt: skip
    pruning = Pruning(out, KEEP, teacher=model, criterion="l2,mean")
    pretrain(config, pruning.forward_step, callbacks=[pruning])


if __name__ == "__main__":
    main(*sys.argv[1:])
