"""Teacher + student + batches -> gradients: losses on vocabulary shards, the frozen teacher, the step."""
