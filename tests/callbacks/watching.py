"""Callbacks of a user's file that look over the shipped ones' shoulders; tests name it as `code:`."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from arctic_like.callbacks.base import Callback, CallbackConfig


def digest(engine: Any) -> str:
    """One digest of all of the module's whole weights. Collective."""
    found = hashlib.sha256()
    for name, weight in engine.named_full_parameters():
        found.update(name.encode() + weight.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class WatchAverageConfig(CallbackConfig):
    """Decay and period of the average that is watched."""

    type: str = "watch_average"
    priority: int = 10
    decay: float = 0.9
    every: int = 1


class WatchAverage(Callback):
    """The average by a hand-written loop in float64, against what is evaluated and exported."""

    name = "watch_average"
    config_type = WatchAverageConfig

    def on_setup_end(self, trainer: Any) -> None:
        engine = trainer.learner().engine
        self.average = {name: w.double() for name, w in engine.master_weights()}
        self.updates = 0
        self.facts: dict[str, Any] = {"evaluated": [], "put_back": [], "far": []}

    def on_step_end(self, trainer: Any) -> None:
        engine = trainer.learner().engine
        for name, weight in engine.master_weights():
            if trainer.global_step % self.config.every == 0:
                share = min(self.config.decay, (1 + self.updates) / (10 + self.updates))
                self.average[name] = share * self.average[name] + (1 - share) * weight.double()
        self.updates += trainer.global_step % self.config.every == 0
        self.before = digest(engine)
        far = [
            float((w.double() - self.average[n]).abs().max()) for n, w in engine.master_weights()
        ]
        self.facts["far"].append(max(far))

    def around_evaluate(self, trainer: Any) -> None:
        # priority: after the average took its place
        engine = trainer.learner().engine
        error = 0.0
        for name, weight in engine.named_full_parameters():
            wanted = self.average[name]
            scale = float(wanted.abs().max())
            error = max(error, float((weight.double() - wanted).abs().max()) / scale)
        self.facts["evaluated"].append(error)

    def on_checkpoint_start(self, trainer: Any) -> None:
        self.facts["put_back"].append(digest(trainer.learner().engine) == self.before)

    def on_train_end(self, trainer: Any) -> None:
        self.facts["put_back"].append(digest(trainer.learner().engine) == self.before)
        if trainer.world.is_main:
            path = trainer.session.directory.path
            (path / "average.json").write_text(json.dumps(self.facts))
            torch.save(self.average, path / "average.pt")


class WatchFrozen(Callback):
    """Which trained parameters a step changed: master weight, the module's, or this rank's momentum."""

    name = "watch_frozen"
    config_type = CallbackConfig

    def on_setup_end(self, trainer: Any) -> None:
        self.moved: list[list[str]] = []
        self.before = self.look(trainer.learner().engine)

    def look(self, engine: Any) -> dict[str, list[torch.Tensor]]:
        """Parameter → copies of all that a step may change."""
        found = {name: [weight] for name, weight in engine.master_weights()}
        for name, weight in engine.named_full_parameters():
            found[name].append(weight.clone())
        states = engine.base_optimizer.state
        momenta = [
            states.get(f, {}).get("exp_avg", torch.zeros_like(f)) for f in engine.layout.flats
        ]
        for name, parameter in engine.trained().items():
            piece = engine.layout.piece(parameter, momenta)
            found[name] += [] if piece is None else [piece.clone()]
        return found

    def on_step_end(self, trainer: Any) -> None:
        now = self.look(trainer.learner().engine)
        self.moved.append([
            name for name, values in now.items()
            if not all(map(torch.equal, values, self.before[name]))
        ])  # fmt: skip
        self.before = now

    def on_train_end(self, trainer: Any) -> None:
        if trainer.world.is_main:
            path = trainer.session.directory.path / "moved.json"
            path.write_text(json.dumps(self.moved))
