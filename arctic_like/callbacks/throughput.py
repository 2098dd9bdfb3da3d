"""How fast a run is: samples, tokens and floating-point operations a second, and their share of the peak."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanFloat, HumanInt

if TYPE_CHECKING:
    from torch import nn

    from arctic_like.trainer.base import Trainer

PEAKS = {
    # dense, bf16 and fp16, from NVIDIA's data sheets; the first name found counts
    "GB200": 2.5e15, "B200": 2.25e15, "H200": 989.4e12, "GH200": 989.4e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989.4e12, "H800": 989.4e12, "A100": 312e12, "A800": 312e12,
    "A40": 149.7e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "V100": 125e12, "T4": 65e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


class ThroughputConfig(CallbackConfig):
    """`type: throughput`."""

    type: str = "throughput"

    window: HumanInt = Field(default=20, ge=1)
    """Means are taken over the last so many steps, without evaluations and checkpoints."""

    peak_flops: Annotated[HumanFloat, Field(gt=0, allow_inf_nan=False)] | None = None
    """Floating-point operations a second that one device can do (`989T`), for `mfu`; from a table by the
    device's name unless given, and nothing on a CPU."""


class Throughput(Callback):
    """`type: throughput`: adds to the train line what all ranks together did in a second.

    `throughput/samples_per_second`; for language models also `…/document_tokens_per_second` (tokens of
    documents in which something is trained, so without padding), `…/flops_per_second` and, where the
    device's peak is known, `mfu`: a share of `peak_flops` × ranks (Chowdhery et al. 2022, PaLM,
    appendix B). Recomputed activations do not count.
    """

    name = "throughput"
    config_type = ThroughputConfig
    config: ThroughputConfig

    def __init__(self, config: ThroughputConfig) -> None:
        super().__init__(config)
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=config.window)
        self._since = 0.0
        self._clock = time.perf_counter
        self._model: ModelCost | None = None
        self._peak: float | None = None

    def on_setup_end(self, trainer: Trainer) -> None:
        """Count the model's parameters; find the device's peak."""
        self._model = model_cost(trainer.module)
        self._peak = self.config.peak_flops or known_peak(
            trainer.device, getattr(trainer.config.model, "dtype", "")
        )

    def on_step_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._since = self._clock()

    def on_step_end(self, trainer: Trainer) -> None:
        """Count this rank's part of the step."""
        assert trainer.batch is not None
        samples = tokens = squares = 0.0
        for micro in trainer.batch.micro_batches:
            if micro.idle or not trainer.world.counts:
                continue
            samples += len(micro.samples)
            if self._model is not None and isinstance(micro.data, Mapping):
                own, own_squares = documents(micro.data)
                tokens += own
                squares += own_squares
        self._steps.append((self._clock() - self._since, samples, tokens, squares))

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        """Add the window's means to the line. Collective."""
        if not self._steps:
            return
        seconds, *counts = (sum(column) for column in zip(*self._steps, strict=True))
        if trainer.device != "cpu":
            import torch

            before = self._clock()
            torch.cuda.synchronize()  # steps are queued; a line has waited for the device already
            seconds += self._clock() - before
        total, *sums = trainer.sum_over_ranks([seconds, *counts])
        values.update(self.rates(total / trainer.world.size, *sums, ranks=trainer.world.size))

    def rates(
        self, seconds: float, samples: float, tokens: float, squares: float, *, ranks: int
    ) -> dict[str, float]:
        """The values of the line. squares: Σ L² over documents of L tokens."""
        seconds = max(seconds, 1e-9)
        found = {"throughput/samples_per_second": samples / seconds}
        if self._model is None or not tokens:
            return found
        flops = self._model.flops(tokens, squares) / seconds
        found["throughput/document_tokens_per_second"] = tokens / seconds
        found["throughput/flops_per_second"] = flops
        if self._peak is not None:
            found["mfu"] = flops / (self._peak * ranks)
        return found


class ModelCost:
    """What a token costs a transformer in forward and backward.

    parameters: those that a token is multiplied with (of experts, the chosen ones; no embedding look-up).
    trained: those of them with a gradient. attention: layers × heads × head size.
    """

    def __init__(self, *, parameters: float, trained: float, attention: float) -> None:
        self.parameters, self.trained, self.attention = parameters, trained, attention

    def flops(self, tokens: float, squares: float) -> float:
        """6 N a token (2 N forward, 2 N for the inputs' gradients and 2 N for the weights', of those that are
        trained) and 12 · layers · heads · head size · L a token of a document of L tokens (PaLM, appendix
        B: causal attention counts in full)."""
        return (4 * self.parameters + 2 * self.trained) * tokens + 12 * self.attention * squares


def model_cost(module: nn.Module) -> ModelCost | None:
    """The cost of a transformers model; None for any other."""
    from arctic_like.engine.divided import whole_shape

    config = getattr(module, "config", None)
    config = getattr(config, "text_config", None) or config
    heads, layers = (
        getattr(config, key, None) for key in ("num_attention_heads", "num_hidden_layers")
    )
    width = getattr(config, "hidden_size", None)
    if not heads or not layers or not width:
        return None
    embeddings = set(module.get_input_embeddings().parameters())  # type: ignore[operator]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    # tied: the matrix is looked up in and multiplied with
    embeddings -= set(head.parameters()) if head is not None else set()
    experts = next((getattr(config, key) for key in ("num_local_experts", "num_experts", "n_routed_experts")
                    if getattr(config, key, None)), 0)  # fmt: skip
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    parameters = trained = 0.0
    for name, parameter in module.named_parameters():
        if parameter in embeddings:
            continue
        count = float(math.prod(whole_shape(parameter)))
        if experts and ".experts." in name:
            count *= chosen / experts
        parameters += count
        trained += count * parameter.requires_grad
    head_size = getattr(config, "head_dim", None) or width // heads
    return ModelCost(parameters=parameters, trained=trained, attention=layers * heads * head_size)


def documents(batch: Mapping[str, Any]) -> tuple[float, float]:
    """(Σ L, Σ L²) over the documents of a batch in which a token is trained; (0, 0) where it has none.

    batch: `position_ids` and `labels`, (rows, length) int64 on the host.
    """
    import numpy as np

    if not {"position_ids", "labels"} <= batch.keys():
        return 0.0, 0.0
    starts = batch["position_ids"].cpu().numpy() == 0
    starts[:, 0] = True
    number = starts.ravel().cumsum() - 1
    lengths = np.bincount(number).astype(np.float64)
    trained = np.bincount(number, weights=batch["labels"].cpu().numpy().ravel() != -100) > 0
    return float(lengths[trained].sum()), float((lengths[trained] ** 2).sum())


def known_peak(device: str, dtype: str) -> float | None:
    """Peak of a CUDA device in bf16 or fp16 by its name; None where it is not known."""
    if device == "cpu" or dtype not in ("bf16", "fp16"):
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
