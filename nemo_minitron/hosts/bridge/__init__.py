"""Megatron-Bridge as a host. Nothing outside this folder imports `megatron.bridge`."""
