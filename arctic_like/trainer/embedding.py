"""`embedding`: vectors of texts, trained on pairs that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.loss import Loss
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.coupled import CoupledTrainer, Coupling, Seen, WholeSet
from arctic_like.trainer.preference_config import raise_problems

if TYPE_CHECKING:
    from torch import Tensor


class EmbeddingConfig(TrainerConfig):
    """A recipe of `type: embedding`."""

    type: str = "embedding"
    """The trainer: vectors of texts that belong together."""

    temperature: Annotated[HumanFloat, Field(gt=0)] = 0.05
    """Similarities are divided by it."""

    learn_temperature: bool = False
    """Train the temperature with the model, from `temperature` on."""

    symmetric: bool = False
    """Also find each positive's anchor among all anchors; the loss is the mean of both."""

    mask_equal_texts: bool = True
    """Leave out negatives that are the positive of the anchor, or of an anchor with the same text."""

    matryoshka_dims: list[Annotated[HumanInt, Field(ge=1)]] = Field(default_factory=list)
    """Train the first so many values of a vector as well: `[64, 128, 384]`. The whole vector counts only if
    its size is listed."""

    matryoshka_weights: list[Annotated[HumanFloat, Field(ge=0)]] = Field(default_factory=list)
    """The weight of each of `matryoshka_dims` in the loss; 1 unless given."""

    coupling: Coupling = "global_batch"
    """Where negatives come from: the texts of the whole global batch, in two passes with the memory of a
    micro-batch, or of one `micro_batch`, in one pass."""

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> Self:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if weights and len(weights) != len(dims):
            message = f"has {len(weights)} weights for {len(dims)} matryoshka_dims"
            problem = Problem(message, "matryoshka_weights", "give one for each, or leave it out")
            raise_problems(type(self).__name__, [problem])
        if len(set(dims)) != len(dims):
            problem = Problem(
                "names a size twice", "matryoshka_dims", "give it a weight in matryoshka_weights"
            )
            raise_problems(type(self).__name__, [problem])
        return self

    @model_validator(mode="after")
    def _temperature_of_the_model(self) -> Self:
        """The model has the parameter: not stated, so a recipe that is written out does not say it."""
        model: Any = self.model
        key = "learned_temperature"
        wanted = self.temperature if self.learn_temperature else None
        stated = getattr(model, key, wanted)
        if stated == wanted:
            return self
        if model.given(key):
            problem = Problem(
                "is the trainer's to set", f"model.{key}",
                "leave it out; set temperature and learn_temperature",
            )  # fmt: skip
            raise_problems(type(self).__name__, [problem])
        made = model.replace(**{key: wanted})
        made.model_fields_set.discard(key)
        self.__dict__["model"] = made
        return self


class EmbeddingTrainer(CoupledTrainer):
    """InfoNCE (`methods/contrastive.py`) over the units of a global batch: an anchor, its positive among all
    positives and hard negatives of all ranks and micro-batches."""

    name = "embedding"
    config_type: ClassVar[type[TrainerConfig]] = EmbeddingConfig
    data_factory_type: ClassVar[Any] = ("embedding",)
    model_factory_type: ClassVar[Any] = ("embedding",)
    checkpoint_engine_type: ClassVar[Any] = ("deepspeed", "huggingface", "sentence_transformers")
    weight_unit: ClassVar[str] = "pairs"

    def configure(self) -> None:
        """Raises RecipeError for Matryoshka dimensions that the model does not have, and for a folder that
        would be read wrongly."""
        module: Any = self.module
        adapters = getattr(module, "peft_config", {}).values()
        if any(getattr(config, "use_dora", False) for config in adapters):
            self._refuse_folders_of_dora()
        size = int(module.config.get_text_config().hidden_size)
        if any(dim > size for dim in self.config.matryoshka_dims):
            raise RecipeError(
                Problem(
                    f"are {self.config.matryoshka_dims}, the model's vectors have {size} values",
                    "matryoshka_dims",
                    f"name sizes up to {size}",
                )
            )

    def _refuse_folders_of_dora(self) -> None:
        # transformers 5.23 loads such a folder, and leaves DoRA's magnitudes out (measured: other vectors)
        for number, engine in enumerate(self.config.checkpoint):
            if engine.type == "sentence_transformers":
                raise RecipeError(
                    Problem(
                        "would be a folder whose DoRA that library reads wrongly",
                        f"checkpoint.{number}.type",
                        "write type: huggingface and merge the adapter, or leave out use_dora",
                    )
                )

    def weight(self, batch: dict[str, Tensor]) -> float:
        """The number of units."""
        return float(len(batch["segment_ids"]))

    def to_device(self, batch: Any) -> Any:
        """The batch's texts, each a row of its own, on the device.

        `input_ids` and `attention_mask` (texts, longest); `slots` (texts,), where among the vectors of
        `width` times `units` each one's belongs; `text_keys` (units, width) int64, -1 for those that are
        not there.
        """
        from arctic_like.methods.contrastive import ABSENT
        from arctic_like.model.embedding import text_rows

        segments = batch["segment_ids"]
        rows, units, width = text_rows(segments), len(segments), 2 + self._negatives
        first = rows.index[:, 0]
        # a sample is one unit: its row and the text's number in it say where the text belongs
        slots = first // segments.shape[1] * width + segments.flatten()[first]
        keys = segments.new_full((units * width,), ABSENT)
        keys[slots] = batch["text_keys"].flatten()[first]
        return super().to_device({
            "input_ids": batch["input_ids"].flatten()[rows.index], "attention_mask": rows.mask,
            "slots": slots, "text_keys": keys.view(units, width),
        })  # fmt: skip

    @property
    def _negatives(self) -> int:
        return int(getattr(self.config.data, "negatives", 0))

    def represent(self, batch: dict[str, Any]) -> Tensor:
        """(units, 2 + negatives, dim) in at least float32, of length 1: anchor, positive, negatives, zeros
        for those that are not there. A learned log(1 / temperature) stands behind each as one value more."""
        import torch
        import torch.nn.functional as F

        from arctic_like.model.embedding import pooled

        mask, (units, width) = batch["attention_mask"], batch["text_keys"].shape
        found = self.model(input_ids=batch["input_ids"], attention_mask=mask)
        vectors = F.normalize(
            pooled(found.last_hidden_state, mask, self.config.model.pooling), dim=-1
        )
        room = vectors.new_zeros(units * width, vectors.shape[1])
        rows = room.index_copy(0, batch["slots"], vectors).view(units, width, -1)
        if not self.config.learn_temperature:
            return rows
        scale = found.log_scale.to(rows).expand(units, width, 1)
        return torch.cat([rows, scale], dim=-1)

    def facts_of(self, batch: dict[str, Any]) -> Tensor | None:
        """(units, 2 + negatives) int64: a number for each text, -1 for those that are not there."""
        keys: Tensor = batch["text_keys"]
        return keys

    def coupled_loss(self, rows: Tensor, facts: Tensor | None) -> Loss:
        """The mean over these anchors, with how many find their positive first."""
        import torch

        from arctic_like.methods.contrastive import (
            ABSENT,
            equal_texts,
            info_nce,
            matryoshka,
            weighted,
        )

        anchors, candidates, anchor_keys, keys = self._parted(rows, facts)
        if self.config.mask_equal_texts:
            left_out = equal_texts(anchor_keys, keys)
        else:
            left_out = (keys == ABSENT).expand(len(anchors), -1)
        scale: Tensor | float = 1 / self.config.temperature
        values: dict[str, Any] = {}
        if self.config.learn_temperature:
            scale = rows[..., -1].mean().exp()
            values["temperature"] = (1 / scale).detach()

        def losses(dim: int) -> Tensor:
            first, others = matryoshka(anchors, dim), matryoshka(candidates, dim)
            return info_nce(
                first, others, inverse_temperature=scale, left_out=left_out,
                symmetric=self.config.symmetric,
            )  # fmt: skip

        dims = self.config.matryoshka_dims or [anchors.shape[1]]
        of_dims = {dim: losses(dim) for dim in dims}
        weights = self.config.matryoshka_weights or [1.0] * len(dims)
        total = weighted(of_dims, dict(zip(dims, weights, strict=True)))
        if len(dims) > 1:
            values |= {f"loss/{dim}": found.detach().mean() for dim, found in of_dims.items()}
        with torch.no_grad():
            scores = (anchors @ candidates.T).masked_fill(left_out, -torch.inf)
            own = torch.arange(len(anchors), device=scores.device)
            values["accuracy"] = (scores.argmax(1) == own).double().mean()
        return Loss(total.mean(), values=values)

    def get_val_metrics(self) -> dict[str, Any]:
        """The loss of a whole evaluation set, and how well its anchors find their positives in it."""
        return {**super().get_val_metrics(), "retrieval": WholeSet(self._retrieval)}

    def validation_step(self, batch: Any) -> Any:
        """The batch's vectors are kept until the set is through."""
        rows, facts = self.represent(batch), self.facts_of(batch)
        self.val_metrics["retrieval"].update(rows, facts)
        if "loss" not in self.val_metrics:
            return self.coupled_loss(rows, facts)
        self.val_metrics["loss"].update(rows, facts)
        return {}

    def _parted(self, rows: Tensor, facts: Tensor | None) -> tuple[Tensor, ...]:
        """(anchors (n, dim); candidates (n + m, dim), the positives first; the keys of both)."""
        import torch

        assert facts is not None
        vectors = rows[..., :-1] if self.config.learn_temperature else rows
        candidates = torch.cat([vectors[:, 1], vectors[:, 2:].flatten(0, 1)])
        keys = torch.cat([facts[:, 1], facts[:, 2:].flatten()])
        return vectors[:, 0], candidates, facts[:, 0], keys

    def _retrieval(self, seen: Sequence[Seen]) -> dict[str, float]:
        """Measures of retrieval over what all ranks have seen of a set. Collective."""
        import torch

        from arctic_like.methods.contrastive import matryoshka, retrieval_means

        everyone = [one for part in self.session.host.gather(list(seen)) for one in part]
        if not everyone:
            return {}
        facts = torch.cat([found for _, found in everyone if found is not None])
        anchors, candidates, anchor_keys, keys = self._parted(
            torch.cat([rows for rows, _ in everyone]), facts
        )
        found = retrieval_means(anchors, candidates, anchor_keys, keys)
        for dim in self.config.matryoshka_dims:
            if dim < anchors.shape[1]:
                short = matryoshka(anchors, dim), matryoshka(candidates, dim)
                measured = retrieval_means(*short, anchor_keys, keys)
                found |= {f"{dim}/{name}": value for name, value in measured.items()}
        return found
