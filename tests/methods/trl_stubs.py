"""TRL's own losses, called with stand-ins for its trainers.

TRL computes its losses inside methods of trainers. Each function here builds an object with the
attributes that the method reads, a model that answers with given tensors, and calls the method: no
formula is ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


class Wide(torch.Tensor):
    """A float64 tensor that stays one where TRL calls `.float()`."""

    def float(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.double()


@contextmanager
def float64_numbers() -> Iterator[None]:
    """Python numbers that become tensors become float64 ones (TRL's `torch.tensor(epsilon)`)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def accelerator() -> SimpleNamespace:
    """That of a single process."""
    return SimpleNamespace(device=CPU, gather=lambda x: x, gather_for_metrics=lambda x: x)


def _trainer(**attributes: Any) -> SimpleNamespace:
    common: dict[str, Any] = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(common | attributes))


def _fused(logprobs: Tensor, concentration: Tensor | None = None) -> Any:
    """A model whose fused head answers with these log-probabilities of tokens, (rows, length - 1)."""
    nothing = torch.zeros_like(logprobs).detach()
    outputs = SimpleNamespace(
        log_probs=logprobs,
        log_sum_sq_probs=nothing if concentration is None else concentration,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )
    return lambda **_: outputs


def dpo_loss(
    trl: Any,
    logprobs: Tensor,
    mask: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    concentration: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """`DPOTrainer._compute_loss`: the mean over pairs.

    logprobs: (2 · pairs, length - 1), 0 outside of answers, all chosen ones first. mask: (2 · pairs,
    length), 1 in answers.
    """
    config = trl.DPOConfig.__dataclass_fields__
    loss_types = settings.pop("loss_types", ["sigmoid"])
    known = {
        "beta": config["beta"].default,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "loss_weights": [1.0] * len(loss_types),
        "args": SimpleNamespace(discopop_tau=settings.pop("discopop_tau", 0.05)),
    }
    trainer = _trainer(loss_types=loss_types, **(known | settings))
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    model = _fused(logprobs, concentration)
    with float64_numbers():
        return trl.DPOTrainer._compute_loss(trainer, model, inputs, False)


def kto_loss(
    trl: Any,
    logprobs: Tensor,
    ref: Tensor,
    desirable: Tensor,
    *,
    mismatched: Tensor,
    ref_mismatched: Tensor,
    **settings: Any,
) -> Tensor:
    """`KTOTrainer._compute_loss`: the mean over answers. logprobs: (answers, length - 1)."""
    known: dict[str, Any] = {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
    known |= settings
    trainer = _trainer(
        calculate_KL=known["loss_type"] == "kto",
        _compute_kl_logps=lambda model, batch: mismatched,
        **known,
    )
    mask = torch.ones(logprobs.shape[0], logprobs.shape[1] + 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": mask,
        "completion_mask": mask,
        "label": desirable,
        "ref_logps": ref,
        "ref_KL_logps": ref_mismatched,
    }
    return trl.KTOTrainer._compute_loss(trainer, _fused(logprobs), inputs, False)


def reward_loss(
    trl: Any, chosen: Tensor, rejected: Tensor, margin: Tensor | None, center: float | None
) -> Tensor:
    """`RewardTrainer.compute_loss`: the mean over pairs."""
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    logits = torch.cat([chosen, rejected])[:, None]
    inputs: dict[str, Any] = {"attention_mask": torch.ones(len(logits), 2, dtype=torch.long)}
    if margin is not None:
        inputs["margin"] = margin
    return trl.RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=logits), inputs
    )


def pair_batch(labels: Tensor) -> dict[str, Tensor]:
    """What CPO's and ORPO's collators give: labels (2 · pairs, length), all chosen ones first. Every
    token that is not trained is padding, so that ORPO's likelihood is of answers alone."""
    parts = labels.chunk(2)
    batch = {}
    for name, part in zip(("chosen", "rejected"), parts, strict=True):
        batch[f"{name}_input_ids"] = part.clamp(min=0)
        batch[f"{name}_attention_mask"] = (part != -100).long()
        batch[f"{name}_labels"] = part
    return batch


def logits_loss(trainer_class: Any, logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """`get_batch_loss_metrics` of CPOTrainer or ORPOTrainer on logits (2 · pairs, length, vocabulary)."""
    trainer = _trainer(
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        concatenated_inputs=trainer_class.concatenated_inputs,
        get_batch_logps=trainer_class.get_batch_logps,
        **settings,
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, name):
            method = getattr(trainer_class, name)
            setattr(trainer, name, method.__get__(trainer))

    def model(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    loss, _ = trainer_class.get_batch_loss_metrics(trainer, model, pair_batch(labels))
    return loss
