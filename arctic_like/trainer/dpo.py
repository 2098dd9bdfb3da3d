"""`dpo`: pairs of answers against a frozen reference, by DPO or one of the losses that came after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from arctic_like.errors import Problem, RecipeError
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.dpo_config import REFERENCE, DPOConfig
from arctic_like.trainer.preference import PreferenceTrainer

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.data.base import PreparedData, SampleSet
    from arctic_like.trainer.learner import Learner
    from arctic_like.trainer.reference import ReferenceTable

TABLED = "reference_sums"
"""Key of a batch on the device: the reference's log-probabilities, where they were precomputed."""


class DPOTrainer(PreferenceTrainer):
    """Losses over log-ratios to a reference: a second model, the policy without its adapter, or a table."""

    name = "dpo"
    config_type: ClassVar[type[TrainerConfig]] = DPOConfig
    config: DPOConfig
    shares_sequences: ClassVar[bool] = True
    _table: ReferenceTable | None = None
    _kept_vocabulary: int | None = None
    """Tokens of a reference that was asked and freed."""

    @property
    def ld_alpha(self) -> float | None:
        """See `DPOConfig.ld_alpha`."""
        return self.config.ld_alpha

    @property
    def weighs_pairs(self) -> bool:
        """See `DPOConfig.use_weighting`."""
        return self.config.use_weighting

    def on_data_prepared(self, data: PreparedData, build: Any) -> None:
        """A reference model that is asked once: built, asked and freed before there is a policy."""
        config = self.config
        if not config.precompute_reference or config.reference is None:
            return
        learner: Learner = build(REFERENCE, config.reference)
        self._check_vocabulary(learner)
        self._tabulate(data, learner)
        learner.engine.destroy()
        _free()

    def configure(self) -> None:
        """Compare vocabularies; ask the policy's initial weights for the table. Raises RecipeError."""
        config = self.config
        from arctic_like.trainer.reference import raise_for_vocabularies, vocabulary

        kept = self._kept_vocabulary
        if REFERENCE in self.learners:
            kept = vocabulary(self.learner(REFERENCE).engine.module)
        raise_for_vocabularies(vocabulary(self.module), kept)
        if config.precompute_reference and config.reference is None:
            begin = getattr(config.model, "weights_from", None)
            if self.session.resume is not None and begin is not None:
                from arctic_like.trainer.transplant import transplant

                # the run began with them; the checkpoint's weights come after this
                transplant(self.learner().engine, begin)
            self._tabulate(self.equipment.data, self.learner())
        elif config.by_adapter and not hasattr(self.module, "disable_adapter"):
            raise RecipeError(
                Problem("has no adapter that could be disabled", "model.peft_config",
                        "state ref_model")
            )  # fmt: skip

    def to_device(self, batch: Any) -> Any:
        """The batch on the device, with the reference's log-probabilities where they are known."""
        moved = super().to_device(batch)
        if self._table is None or not isinstance(batch, dict) or "segment_ids" not in batch:
            return moved
        return {**moved, TABLED: self._table.of(batch).to(self.device)}

    def reference_sums(self, batch: dict[str, Any]) -> Tensor | None:
        """(documents,) float64 without gradient."""
        if not self.config.compares:
            return None
        if TABLED in batch:
            found: Tensor = batch[TABLED]
            return found
        if REFERENCE in self.learners:
            return self.answer_sums(batch, self.learner(REFERENCE)).logprobs
        with self._without_adapter():
            return self.answer_sums(batch, self.learner()).logprobs

    @contextlib.contextmanager
    def _without_adapter(self) -> Iterator[None]:
        import torch

        from arctic_like.trainer.reference import in_evaluation

        module: Any = self.module
        with torch.no_grad(), in_evaluation(module), module.disable_adapter():
            yield

    def _check_vocabulary(self, learner: Learner) -> None:
        from arctic_like.registry import build
        from arctic_like.trainer.reference import raise_for_vocabularies, vocabulary

        part: Any = build(self.config.model, "model")
        self._kept_vocabulary = vocabulary(learner.engine.module)
        # unless it is the tokenizer's, which the policy will say
        raise_for_vocabularies(part.facts().vocab_size, self._kept_vocabulary)

    def _tabulate(self, data: PreparedData, learner: Learner) -> None:
        """Ask the learner for all pairs, or find what it said. Collective."""
        import torch

        from arctic_like.data import cache
        from arctic_like.data.balance import division_of
        from arctic_like.engine.random_state import preserved
        from arctic_like.trainer.reference import fingerprint, in_evaluation, prepare_table

        config, host, engine = self.config, self.session.host, learner.engine

        def score(batch: dict[str, Tensor]) -> Tensor:
            return self.answer_sums(self.to_device(batch), learner).logprobs

        sets: list[SampleSet] = [*data.evaluation.values(), *data.test.values()]
        if data.train is not None and not config.test_only:
            sets.insert(0, data.train)
        with preserved(), torch.no_grad(), in_evaluation(engine.module):
            self._table = prepare_table(
                sets, data.collate, score,
                reference=f"{fingerprint(engine.module, host)} {self.ld_alpha}",
                root=cache.root(getattr(config.data, "cache_dir", None)),
                division=division_of(config.data, config.rows), host=host,
            )  # fmt: skip


def _free() -> None:
    """Give back what an engine held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
