"""A base in 4 or 8 bits under an adapter (QLoRA, Dettmers et al. 2023), by bitsandbytes on CUDA."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    import torch

PLACE = "model.quantization"


def check_bitsandbytes(what: str, *, place: str) -> None:
    """Raise RecipeError where bitsandbytes cannot quantise: without the package, or without CUDA."""
    import torch

    if not torch.cuda.is_available():
        raise RecipeError(
            Problem(f"{what} quantises with bitsandbytes on CUDA, and torch sees no CUDA device", place,
                    "remove it, or run on a GPU")
        )  # fmt: skip
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            Problem(f"{what} quantises with bitsandbytes, which is not installed", place,
                    "pip install 'arctic-like[qlora]'")
        )  # fmt: skip


def loading_options(
    quantization: str, *, dtype: torch.dtype, device: str, zero3: bool
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base in `4bit` (NF4, double quantisation) or `8bit`.

    dtype: what products are computed in. Raises RecipeError where it cannot be.
    """
    if zero3:
        raise RecipeError(
            Problem(f"is {quantization}, and ZeRO stage 3 would cut packed weights apart", PLACE,
                    "set deepspeed.zero_optimization.stage to 2: a frozen base has no optimizer states")
        )  # fmt: skip
    check_bitsandbytes(f"model.quantization: {quantization}", place=PLACE)
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}
