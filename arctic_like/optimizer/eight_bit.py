"""AdamW with states of 8 bits, quantised in blocks of 256 (Dettmers et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from arctic_like.config.values import HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.optimizer.adam import AdamConfig
from arctic_like.optimizer.base import OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups
from arctic_like.optimizer.packages import needed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class AdamW8bitConfig(AdamConfig):
    """AdamW with 8-bit states: a quarter of the memory."""

    type: str = "adamw_8bit"

    min_8bit_size: HumanInt = Field(default=4096, ge=0)
    """Smaller tensors keep states of 32 bits. At ZeRO stages 1 to 3 a rank's piece of a whole group is one
    tensor."""


class PagedAdamW8bitConfig(AdamW8bitConfig):
    """The same, with states in memory that CUDA moves to the host where the device is full."""

    type: str = "paged_adamw_8bit"


class AdamW8bitFactory(OptimizerFactory):
    """AdamW of bitsandbytes with 8-bit states, on every device."""

    name = "adamw_8bit"
    config_type = AdamW8bitConfig
    config: AdamW8bitConfig
    class_name: ClassVar[str] = "AdamW8bit"

    def build(self, *, model: nn.Module, device: str, offload: bool) -> Optimizer:
        """bitsandbytes' AdamW8bit. Raises RecipeError without the package."""
        config = self.config
        package = needed("bitsandbytes.optim", optimizer=self.name, extra="bitsandbytes")
        optimizer: Optimizer = getattr(package, self.class_name)(
            parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups),
            lr=config.learning_rate, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay, min_8bit_size=config.min_8bit_size,
        )  # fmt: skip
        return optimizer


class PagedAdamW8bitFactory(AdamW8bitFactory):
    """AdamW of bitsandbytes with paged 8-bit states, on CUDA."""

    name = "paged_adamw_8bit"
    config_type = PagedAdamW8bitConfig
    class_name: ClassVar[str] = "PagedAdamW8bit"

    def build(self, *, model: nn.Module, device: str, offload: bool) -> Optimizer:
        """bitsandbytes' PagedAdamW8bit. Raises RecipeError where the update is not done on CUDA."""
        if offload or not device.startswith("cuda"):
            where = (
                "the optimizer is offloaded to the CPU" if offload else f"this run is on {device}"
            )
            raise RecipeError(
                Problem(
                    f"paged_adamw_8bit pages memory of CUDA, and {where}",
                    place="optimizer.type",
                    hint="set optimizer.type to adamw_8bit or adamw (any device)",
                )
            )
        return super().build(model=model, device=device, offload=offload)
