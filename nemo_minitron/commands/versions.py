"""The versions that a run folder and a card tell."""

from __future__ import annotations

import importlib.metadata

from nemo_minitron.hosts import host_name

PACKAGES = (
    "nemo_minitron", "nemo_toolkit", "megatron-bridge", "megatron-core", "transformer-engine", "torch", "transformers",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Package -> version, of the packages that decide a result and are installed; and `host`, what runs models."""
    installed = {"host": host_name()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
