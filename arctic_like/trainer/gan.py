"""`gan`: two learners against each other; the recipe's `model` makes samples, the `critic` judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from arctic_like.config.values import HumanInt
from arctic_like.errors import RunError
from arctic_like.loss import Loss
from arctic_like.trainer.base import Trainer, WeightedBatch
from arctic_like.trainer.config import LearnerConfig, TrainerConfig

if TYPE_CHECKING:
    from torch import Tensor

CRITIC = "critic"
_CRITIC_STEP, _GENERATOR_STEP, _EVALUATION, _SHOWN = range(4)


class GANConfig(TrainerConfig):
    """A recipe of `type: gan`."""

    type: str = "gan"
    """The trainer: a generator (`model`) against a `critic`."""

    critic: LearnerConfig = Field(default_factory=LearnerConfig)
    """The critic: real samples to one score a row. Keys as at the top level."""

    latent_size: HumanInt = Field(default=64, ge=1)
    """Numbers that the generator makes a sample of."""

    critic_steps: HumanInt = Field(default=1, ge=1)
    """Updates of the critic before each update of the generator, on the same real samples."""


class GANTrainer(Trainer):
    """The non-saturating game (Goodfellow et al. 2014, section 3), with logistic scores.

    A step updates the critic, then the generator. The noise of a sample depends on seed, step and sample
    alone, so that a step is the same however it is divided.
    """

    name = "gan"
    config_type: ClassVar[type[TrainerConfig]] = GANConfig
    data_factory_type: ClassVar[Any] = ("torch",)
    model_factory_type: ClassVar[Any] = ("torch",)
    tokenizer_factory_type: ClassVar[Any] = ("none",)

    def step(self, micro_batches: Sequence[WeightedBatch]) -> None:
        """An update of the critic (or several), and one of the generator."""
        for _ in range(self.config.critic_steps):
            self.update(CRITIC, micro_batches, self.critic_loss)
        self.update("model", micro_batches)

    def real(self, batch: Any) -> Tensor:
        """The real samples of a batch: the tensor itself, the first of several, or the first value."""
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()))
        found = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not hasattr(found, "shape"):
            raise RunError(f"a batch holds {type(found).__name__} first; expected is a tensor")
        tensor: Tensor = found
        return tensor

    def noise(self, purpose: int, samples: Sequence[int]) -> Tensor:
        """(len(samples), latent_size) standard normal, on the device, in the generator's dtype."""
        from arctic_like.data.order import key_of
        from arctic_like.trainer.noise import normal_noise

        step = self.global_step if purpose in (_CRITIC_STEP, _GENERATOR_STEP) else 0
        key = key_of(self.config.seed, step, purpose)
        values = normal_noise(samples, [self.config.latent_size], key=key)
        return values.to(self.device, next(self.module.parameters()).dtype)

    def critic_loss(self, batch: Any) -> Loss:
        """-log D(x) - log(1 - D(G(z))), the mean over rows; D is the sigmoid of the critic's score."""
        import torch
        import torch.nn.functional as F

        with torch.no_grad():
            made = self.module(self.noise(_CRITIC_STEP, self.samples))
        # one forward over both: the critic is gathered once at ZeRO 3
        real = self.real(batch)
        scores = self.learner(CRITIC).engine(torch.cat([real.to(made.dtype), made])).float()
        of_real, of_made = scores.flatten().split([len(real), len(made)])
        loss = F.softplus(-of_real).mean() + F.softplus(of_made).mean()
        return Loss(loss, values={"score_real": of_real.detach().mean(),
                                  "score_made": of_made.detach().mean()})  # fmt: skip

    def loss(self, batch: Any) -> Tensor:
        """-log D(G(z)), the mean over rows."""
        return self._generator_loss(self.model(self.noise(_GENERATOR_STEP, self.samples)))

    def _generator_loss(self, made: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.softplus(-self.get_module(CRITIC)(made).float().flatten()).mean()

    def validation_step(self, batch: Any) -> dict[str, Any]:
        """Both losses with the noise of the evaluation, which is the same every time."""
        import torch.nn.functional as F

        made = self.module(self.noise(_EVALUATION, self.samples))
        critic = self.get_module(CRITIC)
        real = critic(self.real(batch).to(made.dtype)).float().flatten()
        fake = critic(made).float().flatten()
        judged = F.softplus(-real).mean() + F.softplus(fake).mean()
        return {"loss": F.softplus(-fake).mean(), "critic_loss": judged}

    def model_arguments(self, batch: Any) -> tuple[Any, ...]:
        """Noise for two samples."""
        return (self.noise(_SHOWN, range(2)).cpu(),)

    def generate(self, count: int) -> Tensor:
        """`count` samples, the same noise every time; collective, the model in eval mode meanwhile."""
        import torch

        module = self.module
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad():
                made: Tensor = module(self.noise(_SHOWN, range(count)))
        finally:
            module.train(was_training)
        return made
