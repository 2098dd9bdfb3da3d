"""Adam-mini: one second moment for each head, token or output neuron (Zhang et al. 2025, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.optimizer.adam import AdamConfig
from arctic_like.optimizer.base import OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups
from arctic_like.optimizer.packages import needed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PER_ROW, PER_TENSOR, PER_ELEMENT = "linear", "norm", "bias"
"""Names by which the package chooses one second moment for each row, tensor, element."""

QUERY_KEY = ("q_proj", "k_proj", "query", "key", "wq", "wk")
"""Parts of names in which the package finds queries and keys."""


class AdamMiniConfig(AdamConfig):
    """Adam-mini: nearly no memory for second moments. ZeRO stage 0 only."""

    type: str = "adam_mini"


class AdamMiniFactory(OptimizerFactory):
    """Adam-mini of its authors, at ZeRO stage 0."""

    name = "adam_mini"
    config_type = AdamMiniConfig
    config: AdamMiniConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """adam_mini.Adam_mini. Raises RecipeError without the package, and for experts' stacked matrices.

        Queries and keys have a second moment for each head of the model's config, every other matrix
        for each row (output neuron or token), LoRA's too; norms one for all; biases one for each element.
        """
        package = needed("adam_mini", optimizer=self.name, extra="optimizers")
        config = self.config
        groups = parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        parts = [(group, parameter) for group in groups for parameter in group["params"]]
        head = head_size(model)
        optimizer: Optimizer = package.Adam_mini(
            [(block_name(names[id(p)], p, head=head), p) for _, p in parts],
            lr=config.learning_rate, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay, verbose=False,
        )  # fmt: skip
        facts: Any = optimizer
        # it would take dim² / heads, which is wrong where the config states head_dim
        facts.head_numel = head
        # it counts devices; at stage 0 every rank has whole parameters
        facts.world_size = 1
        for its, (group, _) in zip(optimizer.param_groups, parts, strict=True):
            own = {key: value for key, value in group.items() if key != "params"}
            if "betas" in own:
                own["beta1"], own["beta2"] = own.pop("betas")
            its.update(own)
        return optimizer


def head_size(model: nn.Module) -> int | None:
    """Weights of one attention head in a query or key matrix (head_dim × width); None: not known."""
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    width = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if not width or not heads:
        return None
    return int((getattr(config, "head_dim", None) or width // heads) * width)


def block_name(name: str, parameter: nn.Parameter, *, head: int | None) -> str:
    """The name that tells the package how to cut a parameter; see `AdamMiniFactory.build`."""
    leaf = name.rpartition(".")[2].lower()
    if leaf.endswith("bias"):
        return PER_ELEMENT
    if parameter.ndim < 2:
        return PER_TENSOR
    if parameter.ndim > 2:
        raise RecipeError(
            Problem(
                f"adam_mini cuts matrices into rows, and {name} has {parameter.ndim} dimensions",
                place="optimizer.type",
                hint="take adamw, or freeze that parameter",
            )
        )
    lowered = name.lower()
    by_head = head is not None and parameter.numel() % head == 0 and "lora_" not in lowered
    return QUERY_KEY[0] if by_head and any(part in lowered for part in QUERY_KEY) else PER_ROW
