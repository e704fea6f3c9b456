"""The networks: every one is built from its card, by name, and is made of named stages."""

from fedscan.models.registry import ModelCard, build, models

__all__ = ["ModelCard", "build", "models"]
