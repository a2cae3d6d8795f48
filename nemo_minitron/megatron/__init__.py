"""Live, sharded Megatron models, which any host may have built: they are filled, read, scored, fitted and distilled."""
