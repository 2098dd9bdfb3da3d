"""arctic_like: post-train language models, and any torch model, from one YAML recipe under DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arctic_like.api import fit, run
    from arctic_like.loss import Loss
    from arctic_like.recipe import load_recipe
    from arctic_like.trainer.base import Trainer
    from arctic_like.trainer.causal import CausalTrainer
    from arctic_like.trainer.sft import SFTTrainer

__version__ = "0.1.0"

_HOMES = {
    "CausalTrainer": "arctic_like.trainer.causal",
    "Loss": "arctic_like.loss",
    "SFTTrainer": "arctic_like.trainer.sft",
    "Trainer": "arctic_like.trainer.base",
    "fit": "arctic_like.api",
    "load_recipe": "arctic_like.recipe",
    "run": "arctic_like.api",
}

__all__ = [
    "CausalTrainer", "Loss", "SFTTrainer", "Trainer", "__version__", "fit", "load_recipe", "run"
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: `import arctic_like` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'arctic_like' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
