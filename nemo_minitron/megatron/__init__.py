"""Canonical tensors <-> live, sharded Megatron models, whatever the host that runs them."""
