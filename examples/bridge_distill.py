"""Distils a pruned student in your own Bridge script: torchrun examples/bridge_distill.py STUDENT TEACHER CORPUS OUT

STUDENT and TEACHER are Hugging Face folders; the teacher may also be a checkpoint. CORPUS is the prefix of Megatron's
.bin/.idx files. OUT gets plain checkpoints of Megatron-Bridge, which do not need nemo_minitron. Edit the layout here.
"""

import sys

STEPS, LENGTH = 4, 32


def main(student: str, teacher: str, corpus: str, out: str) -> None:
    from nemo_minitron.bridge import setup

    setup()  # imports Bridge; it changes nothing if CUDA and Transformer Engine are there
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training import config as bridge
    from megatron.bridge.training.pretrain import pretrain

    from nemo_minitron.bridge import Distillation

    model = AutoBridge.from_hf_pretrained(student).to_megatron_provider(load_weights=True)
    model.seq_length, model.gradient_accumulation_fusion = LENGTH, False
    config = bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(train_iters=STEPS, micro_batch_size=1, global_batch_size=2),
        validation=bridge.ValidationConfig(eval_iters=0),
        optimizer=bridge.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-4, use_distributed_optimizer=True),
        scheduler=bridge.SchedulerConfig(lr_decay_style="cosine", start_weight_decay=0.1, end_weight_decay=0.1),
        ddp=bridge.DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=bridge.GPTDatasetConfig(
            random_seed=1234, seq_length=LENGTH, blend=([corpus], None), split="1,0,0", num_workers=0,
            reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, dataloader_type="single",
        ),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=student),
        checkpoint=bridge.CheckpointConfig(save=out, load=out, save_interval=STEPS),
        logger=bridge.LoggerConfig(log_interval=1),
        dist=bridge.DistributedInitConfig(distributed_backend="nccl" if torch.cuda.is_available() else "gloo"),
    )  # fmt: skip
    distillation = Distillation(config, teacher, "forward_kl", precision="fp32")
    pretrain(config, distillation.forward_step, callbacks=[distillation])


if __name__ == "__main__":  # saving a checkpoint starts a helper that imports this file again
    main(*sys.argv[1:])
