"""NEFTune: noise on the token embeddings, in training only (Jain et al. 2023, arXiv 2310.05914)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem, RecipeError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.trainer.base import Trainer

_PURPOSE = 0x6E6566
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
_FIRST = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


class NEFTuneConfig(CallbackConfig):
    """`type: neftune`."""

    type: str = "neftune"

    alpha: Annotated[HumanFloat, Field(ge=0)] = 5.0
    """Strength; the paper uses 5, 10 and 15."""

    module: str = ""
    """Name of the module whose output gets the noise; the model's input embeddings unless given."""


class NEFTune(Callback):
    """`type: neftune`: adds uniform noise in ±alpha / sqrt(L · d) to the embeddings (algorithm 1).

    L: length of the token's own document, so that packing and padding change nothing; d: width of the
    embedding. The noise of a token depends on seed, step, sample and place alone: it is the same for any
    number of ranks and micro-batches, on any device, and no random generator is used.
    """

    name = "neftune"
    config_type = NEFTuneConfig
    needs_whole_rows = True
    config: NEFTuneConfig

    def __init__(self, config: NEFTuneConfig) -> None:
        super().__init__(config)
        self._scale: Tensor | None = None
        self._keys: list[int] = []

    def on_setup_end(self, trainer: Trainer) -> None:
        """Hook the embeddings. Raises RecipeError where the model has none."""
        embeddings = self._find(trainer.module)
        embeddings.register_forward_hook(self._add)

    def _find(self, module: Any) -> Any:
        if self.config.module:
            known = dict(module.named_modules())
            if self.config.module not in known:
                raise _wrong(f"is {self.config.module!r}, which the model does not have", "module",
                             f"it has {', '.join([name for name in known if name][:8])}, …")  # fmt: skip
            return known[self.config.module]
        getter = getattr(module, "get_input_embeddings", None)
        try:
            found = getter() if getter is not None else None
        except NotImplementedError:
            found = None
        if found is None:
            raise _wrong(f"needs token embeddings, and {type(module).__name__} does not name any",
                         "", "say which module they are in `module`")  # fmt: skip
        return found

    def on_micro_batch_start(self, trainer: Trainer, batch: Any) -> None:
        """Note which samples are coming, and how long each token's document is."""
        if trainer.updating != "model":
            return
        from arctic_like.data.order import key_of

        key = key_of(trainer.config.seed, trainer.global_step, _PURPOSE)
        self._keys = [key_of(key, sample) for sample in trainer.samples]
        positions = batch.get("position_ids") if isinstance(batch, Mapping) else None
        self._scale = None if positions is None else document_lengths(positions)

    def on_micro_batch_end(self, trainer: Trainer, batch: Any, loss: Any) -> None:
        """The forward is over: nothing else gets noise."""
        self._keys = []

    def _add(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        if not module.training or not self._keys:
            return output
        rows, width = len(self._keys), output.shape[-1]
        places = output.numel() // width
        if places % rows or (self._scale is not None and self._scale.numel() != places):
            raise RunError(
                f"NEFTune cannot tell which of {rows} samples the embeddings of shape "
                f"{tuple(output.shape)} belong to\n    take `neftune` out of `callbacks`"
            )
        import torch

        length = places // rows
        noise = noise_of(self._keys, length, width, device=str(output.device))
        lengths = (
            torch.full((rows, length), length, device=output.device)
            if self._scale is None
            else self._scale.view(rows, length)
        )
        bound = self.config.alpha / (lengths.float() * width).sqrt()
        return output + (noise * bound[..., None]).to(output.dtype).view(output.shape)


def document_lengths(position_ids: Tensor) -> Tensor:
    """(rows, length) int64: of each token, how many tokens its document has. Positions restart at 0 with
    each document; rows are apart from each other."""
    import torch

    starts = position_ids == 0
    starts[:, 0] = True
    number = starts.flatten().long().cumsum(0) - 1
    return torch.bincount(number)[number].view(position_ids.shape)


def noise_of(keys: Sequence[int], length: int, width: int, *, device: str) -> Tensor:
    """Uniform in [-1, 1), (len(keys), length, width) float32 on the device.

    keys: of each row, 64 bits. Element number i of a row is splitmix64 (Steele, Lea and Flood 2014) of
    key + i, its upper 24 bits: so a longer row begins with the same numbers.
    """
    import torch

    signed = [key - (1 << 64) if key >= 1 << 63 else key for key in keys]
    place = torch.arange(length * width, device=device)
    words = torch.tensor(signed, device=device)[:, None] + place * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words = (words ^ _shifted(words, shift)) * factor
    words = words ^ _shifted(words, 31)
    # 24 bits are what a float32 holds exactly
    return (_shifted(words, 40).float() * 2.0**-23 - 1.0).view(len(keys), length, width)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64, which shifts arithmetically."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _wrong(message: str, key: str, hint: str) -> RecipeError:
    return RecipeError(Problem(message, f"callbacks.neftune{'.' if key else ''}{key}", hint))
