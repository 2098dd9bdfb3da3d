"""Losses that couple the samples of a global batch: in-batch negatives, sorted margins, batch baselines.

Such a loss is no mean over micro-batches. A step therefore goes twice through the model: without
gradient, to learn what the loss sees of every sample (a score, an embedding); then the loss is computed
over the whole global batch, in the same way on every rank, with its derivative by each of those
quantities; then every micro-batch goes through again and hands its part of the derivative on. That is the
gradient of the coupled loss by the chain rule, for any division into ranks and micro-batches, and its
memory is that of one micro-batch (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", section 3).

Both passes begin with the same random generators, so dropout falls alike; `on_micro_batch_start` comes
in both, `on_micro_batch_end`, which brings the loss, in the second. An evaluation set is one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from arctic_like.errors import RunError
from arctic_like.loss import Loss
from arctic_like.trainer.base import Trainer, WeightedBatch
from arctic_like.trainer.surface import MAIN

if TYPE_CHECKING:
    from torch import Tensor

Coupling = Literal["global_batch", "micro_batch"]
Seen = tuple["Tensor", "Tensor | None"]
"""(rows, facts) of a batch, without gradient."""


class CoupledTrainer(Trainer):
    """A trainer whose loss is `coupled_loss(represent(batch), facts_of(batch))`.

    With `coupling` "global_batch" the loss sees the rows of all micro-batches of all ranks at once; with
    "micro_batch" those of one, which is what most other programs do and depends on the division.
    """

    @property
    def coupling(self) -> Coupling:
        """Over what the loss couples samples."""
        found: Coupling = getattr(self.config, "coupling", "global_batch")
        return found

    @property
    def couples(self) -> bool:
        """Whether the loss is more than a mean of the rows' own; a step then takes two passes."""
        return True

    def represent(self, batch: Any) -> Tensor:
        """What the loss sees of a batch: (rows, …) with gradient, a row for each unit of
        `weight(batch)`, in the batch's order."""
        raise NotImplementedError

    def facts_of(self, batch: Any) -> Tensor | None:
        """What else the loss has to know of the same rows, without gradient: (rows, …), or None."""
        return None

    def coupled_loss(self, rows: Tensor, facts: Tensor | None) -> Loss:
        """The mean over all rows, from `represent` and `facts_of`. The same on every rank: it must not
        draw random numbers. The order of the rows, which the division decides, must not matter."""
        raise NotImplementedError

    def row_values(self, rows: Tensor, facts: Tensor | None) -> dict[str, Any]:
        """What an evaluation of a coupled loss shows besides: name → mean over these rows."""
        return {}

    def loss(self, batch: Any) -> Tensor | Loss:
        """The loss of these rows alone: of a loss that does not couple, or with `micro_batch`."""
        return self.coupled_loss(self.represent(batch), self.facts_of(batch))

    def get_val_metrics(self) -> dict[str, Any]:
        """`loss` of a whole evaluation set, where it couples samples."""
        return {"loss": WholeSet(self._loss_of_set)} if self._takes_all else {}

    def validation_step(self, batch: Any) -> Any:
        """The loss of the batch; of a coupled loss its rows are kept until the set is through."""
        if not self._takes_all:
            return self.loss(batch)
        rows, facts = self.represent(batch), self.facts_of(batch)
        self.val_metrics["loss"].update(rows, facts)
        return self.row_values(rows, facts)

    def step(self, micro_batches: Sequence[WeightedBatch]) -> None:
        """See the module."""
        alone = self.world.data_size == 1 and len(micro_batches) == 1
        if not self._takes_all or alone:
            super().step(micro_batches)
            return
        from arctic_like.engine.random_state import random_state, set_random_state

        begin = random_state()
        shares, whole, first = self._derivatives(self._look(micro_batches))
        weighed = [index for index, micro in enumerate(micro_batches) if micro.weight]
        bringer = weighed[0] if first and weighed else None

        def share(batch: Any) -> Loss:
            index = self.session.micro_batch
            if index == 0:
                set_random_state(begin)
            rows, weight = self.represent(batch), micro_batches[index].weight
            part_of_step = weight / self.session.step_weight
            # sums over the whole batch, which one micro-batch of all ranks brings
            groups = whole.groups if index == bringer else dict.fromkeys(whole.groups, (0.0, 0.0))
            if not weight:
                return Loss((rows * 0).sum(), values=whole.values, groups=groups)
            # the trainer scales by weight / total; the derivative is already that of the whole mean
            part = (rows * shares[index]).sum() / part_of_step
            return Loss(part - part.detach() + whole.mean, values=whole.values, groups=groups)

        self.update(MAIN, micro_batches, share)

    @property
    def _takes_all(self) -> bool:
        return self.couples and self.coupling == "global_batch"

    def _look(self, micro_batches: Sequence[WeightedBatch]) -> list[Seen]:
        """(rows, facts) of each micro-batch; none of one that stands in."""
        import torch

        seen = []
        with torch.no_grad():
            for index, micro in enumerate(micro_batches):
                self.session.micro_batch, self.samples = index, micro.samples
                batch = self.to_device(micro.data)
                self.emit("on_micro_batch_start", batch)
                rows, facts = self.represent(batch), self.facts_of(batch)
                if micro.weight and len(rows) != micro.weight:
                    raise RunError(
                        f"{type(self).__name__}.represent gave {len(rows)} rows, but weight(batch) is "
                        f"{micro.weight:g}; there must be a row for each unit of weight"
                    )
                count = len(rows) if micro.weight else 0
                seen.append((rows[:count], None if facts is None else facts[:count]))
        return seen

    def _derivatives(self, seen: Sequence[Seen]) -> tuple[list[Tensor], Loss, bool]:
        """(of each micro-batch: derivative of the loss by its rows; the loss over all rows; whether this
        is the first rank that has any)."""
        import torch

        mine = torch.cat([rows for rows, _ in seen])
        known = [facts for _, facts in seen if facts is not None]
        parts = self._all_rows(mine)  # one part for each group of ranks that share rows
        everything = torch.cat(parts).requires_grad_()
        facts = torch.cat(self._all_rows(torch.cat(known))) if known else None
        with torch.enable_grad():
            whole = self.coupled_loss(everything, facts)
            (derivative,) = torch.autograd.grad(whole.mean, everything)
        start = sum(len(part) for part in parts[: self.world.data_rank])
        own = derivative[start : start + len(mine)]
        values = {name: torch.as_tensor(value).detach() for name, value in whole.values.items()}
        shares = list(torch.split(own, [len(rows) for rows, _ in seen]))
        loss = Loss(whole.mean.detach(), values=values, groups=whole.groups)
        return shares, loss, start == 0 < len(mine) and self.world.counts

    def _all_rows(self, rows: Tensor) -> list[Tensor]:
        """The rows of every group of ranks that share rows, by rank: every rank's, where none do."""
        if self.world.data_size == 1:
            return [rows]
        import torch
        import torch.distributed as dist

        counts = self.session.host.gather(len(rows))
        room = rows.new_zeros(max(counts), *rows.shape[1:])
        room[: len(rows)] = rows
        found = [torch.empty_like(room) for _ in counts]
        dist.all_gather(found, room)
        parts = [part[:count] for part, count in zip(found, counts, strict=True)]
        return parts[:: self.world.group_size]

    def _loss_of_set(self, seen: Sequence[Seen]) -> dict[str, float]:
        """The loss over what all ranks have seen of an evaluation set; nothing of none. Collective."""
        import torch

        everyone = [one for part in self.session.host.gather(list(seen)) for one in part]
        if not everyone:
            return {}
        facts = [found for _, found in everyone if found is not None]
        found = self.coupled_loss(
            torch.cat([rows for rows, _ in everyone]), torch.cat(facts) if facts else None
        )
        return {"": float(found.mean)}


class WholeSet:
    """The rows of an evaluation set, as torchmetrics keeps its state: updated, computed, reset."""

    # the stand-in of an idle rank is undone by copying `vars`, in which the trainer must not be
    __slots__ = ("__dict__", "_measure")

    def __init__(self, measure: Callable[[Sequence[Seen]], dict[str, float]]) -> None:
        self._measure = measure
        self.seen: list[Seen] = []

    @property
    def update_called(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.seen)

    def update(self, rows: Tensor, facts: Tensor | None) -> None:
        """Take in a batch."""
        self.seen.append((rows.detach().cpu(), None if facts is None else facts.cpu()))

    def compute(self) -> dict[str, float]:
        """The loss over all ranks' rows. Collective."""
        return self._measure(self.seen)

    def reset(self) -> None:
        """Forget them."""
        self.seen = []
