"""Run on every rank: weights_probe.py FOLDER JOBS. Each job is a check below with its arguments; what
the checks found, on all ranks, goes to FOLDER/found.json for `test_gradients` and `test_surgery`."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor

from arctic_like.engine import deepspeed as deepspeed_module
from arctic_like.engine import thrift as thrift_module
from arctic_like.engine.deepspeed import Engine, to_universal
from arctic_like.engine.host import connect
from arctic_like.engine.states import tensors_in
from arctic_like.engine.surgery import Rows
from arctic_like.errors import ArcticError
from arctic_like.world import World
from tests.engine import points
from tests.engine.points import Reference, error, same_bits

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
FOLDER = Path(sys.argv[1])


def masters(one: Engine) -> dict[str, Tensor]:
    return dict(one.master_weights())


def digest(*states: Any) -> str:
    """One digest of tensors and plain values, in order."""
    found = hashlib.sha256()
    for state in states:
        for key, value in state.items():
            value = value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode()
            found.update(str(key).encode() + value)
    return found.hexdigest()


def step(one: Engine, number: int, dtype: str) -> None:
    points.backward(one, number, RANK, WORLD, dtype)
    one.step()


def gradients(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """Read, replaced, used: against plain torch."""
    one, other = points.engine(stage, dtype, WORLD, **options), Reference(dtype, WORLD)
    found: dict[str, Any] = {}
    for number in range(2):
        expected = other.gradients(number)
        points.backward(one, number, RANK, WORLD, dtype)
        read = one.gradients()
        found[f"read {number}"] = error(read, expected)
        found[f"float32 {number}"] = all(g.dtype == torch.float32 for g in read.values())
        # Everything that follows starts from the same gradients: Adam divides by small ones.
        expected = dict(read)
        torch.manual_seed(number)
        changed = {"points": torch.randn(37, 3), "spare.weight": torch.randn(5, 3).double()}
        if dtype == "bf16" and stage == 0:
            changed = {name: value.bfloat16() for name, value in changed.items()}
        one.set_gradients(changed)
        expected |= {name: value.float() for name, value in changed.items()}
        found[f"set {number}"] = error(one.gradients(), expected)
        one.step()
        norm = other.update(expected)
        found[f"norm {number}"] = abs(float(one.grad_norm) - norm) / norm
        found[f"weights {number}"] = error(masters(one), dict(other.named))
    found["digest"] = digest(read)
    for problem, action in {
        "late": one.gradients,
        "unknown": lambda: _between(one, dtype, {"point": torch.zeros(37, 3)}),
        "shape": lambda: _between(one, dtype, {"points": torch.zeros(3, 37)}),
    }.items():
        found[problem] = message(action)
    one.destroy()
    return found


def _between(one: Engine, dtype: str, values: dict[str, Tensor]) -> None:
    points.backward(one, 9, RANK, WORLD, dtype)
    try:
        one.set_gradients(values)
    finally:
        one.step()


def message(action: Any) -> str:
    try:
        action()
    except ArcticError as problem:
        return str(problem)
    return ""


def changes() -> dict[str, Rows]:
    """Rows of three parameters: pruned and grown, permuted, and only pruned by a mask."""
    torch.manual_seed(5)
    keep = torch.tensor([3, 1, 4, 1, 36, 9, 2, 6])
    return {
        "points": Rows(keep=keep, new=torch.randn(23, 3)),
        "colors": Rows(keep=keep, new=torch.randn(23, 2),
                       moments={"exp_avg": torch.randn(23, 2) * 1e-3}),
        "sharpness": Rows(keep=torch.cat([torch.arange(31)])),
    }  # fmt: skip


def by_hand(other: Reference, rows: dict[str, Rows]) -> None:
    for name, row in rows.items():
        keep = torch.arange(len(other.named[name])) if row.keep is None else row.keep
        other.resize(name, keep, row.new, **row.moments)


def idle(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """Parameters that only some micro-batches, or no micro-batch of a step reach."""
    one, other = points.engine(stage, dtype, WORLD, **options), Reference(dtype, WORLD)
    worst, weights = 0.0, 0.0
    for number, reaches in enumerate(["yy", "nn", "yn", "ny", "nn", "ny", "yy"]):
        used = [letter == "y" for letter in reaches]
        expected = other.gradients(number, spare=used)
        points.backward(one, number, RANK, WORLD, dtype, spare=used)
        read = one.gradients()
        worst = max(worst, error(read, expected))
        one.step()
        other.update(dict(read) if stage == 0 else expected)
        weights = max(weights, error(masters(one), dict(other.named)))
    one.destroy()
    return {"gradients": worst, "weights": weights}


def later(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """Frozen before the first step, frozen after some, and trained again."""
    one, other = points.engine(stage, dtype, WORLD, **options), Reference(dtype, WORLD)
    worst = 0.0
    for number, frozen in enumerate(
        [("spare.weight",), (), ("points", "head.0.bias"), ("points",), ()]
    ):
        for name, parameter in one.module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        states = {p: other.optimizer.state.pop(p) for p in (other.named[n] for n in frozen)
                  if p in other.optimizer.state}  # fmt: skip
        kept = {name: other.named[name].detach().clone() for name in frozen}
        points.backward(one, number, RANK, WORLD, dtype)
        read = one.gradients()
        expected = other.gradients(number)
        assert read.keys() == expected.keys() - set(frozen)
        for name in frozen:
            expected[name] = torch.zeros_like(expected[name])
        one.step()
        other.update({**expected, **(read if dtype == "bf16" else {})})
        for name in frozen:
            parameter = other.named[name]
            parameter.data = kept[name]
            # A share counts the steps of all its parameters together; at stage 0 each has its own.
            now = other.optimizer.state[parameter]
            now["exp_avg"].zero_()
            now["exp_avg_sq"].zero_()
            if parameter in states:
                now.update({k: states[parameter][k] for k in ("exp_avg", "exp_avg_sq")})
            now["step"].fill_(number + 1)
            if stage == 0 and dtype == "fp32":
                now["step"] = states[parameter]["step"] if parameter in states else now["step"] * 0
        other.lower()
        worst = max(worst, error(masters(one), dict(other.named)))
        lowered = {n: w.to(points.DTYPES[dtype]) for n, w in masters(one).items()}
        seen = {n: w.clone() for n, w in one.named_full_parameters()}
        assert same_bits(seen, lowered)
    one.destroy()
    return {"weights": worst}


def surgery(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """Grown and pruned between steps, and between backward and step: against plain torch."""
    one, other = points.engine(stage, dtype, WORLD, **options), Reference(dtype, WORLD)
    found: dict[str, Any] = {}
    schedule = torch.optim.lr_scheduler.ExponentialLR(one.base_optimizer, 0.9)
    their = torch.optim.lr_scheduler.ExponentialLR(other.optimizer, 0.9)
    number = 0

    def both() -> None:
        nonlocal number
        step(one, number, dtype)
        other.update(other.gradients(number))
        schedule.step()
        their.step()
        number += 1

    same = one.module.points
    both()
    both()
    one.resize(changes())
    by_hand(other, changes())
    found["at once"] = error(masters(one), dict(other.named))
    both()
    both()
    found["later"] = error(masters(one), dict(other.named))
    torch.manual_seed(7)
    pruned = torch.rand(31) < 0.6
    grown = {name: Rows(keep=pruned, new=torch.randn(5, *one.shapes()[name][1:]))
             for name in ("points", "colors", "sharpness")}  # fmt: skip
    points.backward(one, number, RANK, WORLD, dtype)
    before = one.gradients()
    one.resize(grown)
    carried = one.gradients()
    expected = other.gradients(number)
    for name, row in grown.items():
        zeros = torch.zeros(5, *before[name].shape[1:])
        before[name] = torch.cat([before[name][pruned], zeros])
        expected[name] = torch.cat([expected[name][pruned], zeros])
        other.resize(name, pruned, row.new)
    found["carried"] = same_bits(carried, before)
    one.step()
    norm = other.update(expected)
    found["norm"] = abs(float(one.grad_norm) - norm) / norm
    schedule.step()
    their.step()
    number += 1
    both()
    found["last"] = error(masters(one), dict(other.named))
    found["same object"] = one.module.points is same
    rates = [group["lr"] for group in one.base_optimizer.param_groups]
    found["rates"] = rates == [group["lr"] for group in other.optimizer.param_groups]
    found["counted"] = int(one.engine.global_steps) == number
    found["digest"] = digest(masters(one))
    one.destroy()
    return found


def nothing(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """A change of nothing, before the first step, between steps, between backward and step."""
    runs = []
    for touched in (False, True):
        one = points.engine(stage, dtype, WORLD, **options)
        norms = []
        for number in range(5):
            if touched and number in (0, 2):
                one.resize({"points": Rows()})
            points.backward(one, number, RANK, WORLD, dtype)
            if touched and number == 3:
                one.resize({"colors": Rows(), "head.0.weight": Rows()})
            one.step()
            norms.append(float(one.grad_norm))
        runs.append((masters(one), norms))
        one.destroy()
    return {"bits": same_bits(runs[0][0], runs[1][0]), "norms": runs[0][1] == runs[1][1]}


def save(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """Train, grow, save, go on; `load` does the second half in another process."""
    one = points.engine(stage, dtype, WORLD, **options)
    for number in range(2):
        step(one, number, dtype)
    one.resize(changes())
    step(one, 2, dtype)
    one.save(FOLDER / f"{WORLD}-{stage}-{dtype}", tag="engine")
    found = {"saved": digest(masters(one)), "rows": one.shapes()["points"]}
    for number in range(3, 5):
        step(one, number, dtype)
    found["digest"] = digest(masters(one))
    one.destroy()
    return found


def load(stage: int, dtype: str, *, ranks: int = WORLD, **options: Any) -> dict[str, Any]:
    """What `ranks` ranks have saved, into a model of the shapes that theirs had first."""
    saved, elsewhere = FOLDER / f"{ranks}-{stage}-{dtype}", ranks != WORLD and stage > 0
    one = points.engine(stage, dtype, WORLD, seed=3, universal=elsewhere, **options)
    if elsewhere:
        converted = FOLDER / f"{saved.name}-for-{WORLD}"
        if RANK == 0:
            to_universal(saved / "engine", converted / "engine")
        one.host.barrier()
        saved = converted
    one.load(saved, tag="engine")
    found = {"saved": digest(masters(one)), "rows": one.shapes()["points"],
             "resized": sorted(one.resized)}  # fmt: skip
    for number in range(3, 5):
        step(one, number, dtype)
    found["digest"] = digest(masters(one))
    one.destroy()
    return found


def mistaken(stage: int, dtype: str, *, ranks: int = WORLD) -> dict[str, Any]:
    """A checkpoint whose shapes another model has, that no surgery made; and of other weights."""
    saved = FOLDER / f"{ranks}-{stage}-{dtype}"
    one = points.engine(stage, dtype, WORLD, seed=3)
    facts = saved / "engine" / "shapes.json"
    kept = facts.read_text()
    found = {}
    one.host.barrier()
    for name, (old, new) in {
        "shape": ('"resized": ["colors", "points",', '"resized": ["colors",'),
        "names": ('"sharpness":', '"sharpest":'),
    }.items():
        if RANK == 0:
            facts.write_text(kept.replace(old, new))
        one.host.barrier()
        found[name] = message(lambda: one.load(saved, tag="engine"))
        one.host.barrier()
    if RANK == 0:
        facts.write_text(kept)
    one.host.barrier()
    one.destroy()
    return found


def swapping(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """Whole weights looked at, changed, replaced and put back."""
    one = points.engine(stage, dtype, WORLD, **options)
    other = points.engine(0, dtype, WORLD, seed=8)
    data = points.batch(50, 0, 1, 1, dtype)[0]

    @torch.no_grad()
    def output(of: Any) -> Tensor:
        return of(data).float()

    for number in range(2):
        step(one, number, dtype)
        step(other, number, dtype)
    kept, own = masters(one), output(one)
    theirs = {n: p.detach().clone() for n, p in other.module.named_parameters()}
    found: dict[str, Any] = {}
    with one.swap_weights(theirs):
        found["swapped"] = torch.equal(output(one.module), output(other.module))
        found["training refused"] = message(lambda: one.backward(torch.zeros(()), last=True))
    found["back"] = torch.equal(output(one), own)
    halves = [partition * 0.5 for partition in one.partitions()]
    expected = {n: (w * 0.5).to(points.DTYPES[dtype]) for n, w in kept.items()}
    with one.partition_values(halves):
        inside = output(one)
        seen = {n: w.clone() for n, w in one.named_full_parameters()}
        found["partitions"] = same_bits(seen, expected)
    with one.swap_weights(expected):
        found["same forward"] = torch.equal(output(one), inside)
    found["back again"] = torch.equal(output(one), own) and same_bits(masters(one), kept)
    with contextlib.suppress(ValueError), one.swap_weights(theirs):
        raise ValueError
    found["after an error"] = torch.equal(output(one), own)
    with one.full_parameters(["points"], modify=True) as whole:
        if RANK == 0:
            whole["points"].data[5] = 1.25
    now = masters(one)
    kept["points"][5] = 1.25
    found["modified"] = same_bits(now, kept)
    step(one, 2, dtype)
    seen = {n: w.clone() for n, w in one.named_full_parameters()}
    lowered = {n: w.to(points.DTYPES[dtype]) for n, w in masters(one).items()}
    found["trained"] = same_bits(seen, lowered) and not same_bits(masters(one), kept)
    found["digest"] = digest(masters(one))
    one.destroy()
    other.destroy()
    return found


def adversary(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """A generator's step through a critic under its own engine, then the critic's, then again."""
    one, critic = (points.engine(stage, dtype, WORLD, seed=s, clip=0.0) for s in (0, 1))
    mine, theirs = (Reference(dtype, WORLD, clip=0.0, seed=s) for s in (0, 1))
    fixed = critic.module.spare.bias.requires_grad_(False)
    found: dict[str, Any] = {"gradients": 0.0}

    def through(generator: Any, judge: Any, number: int, rank: int) -> Tensor:
        data = points.batch(number, rank, 0, WORLD, dtype)[0]
        made = generator(data)
        queries = torch.stack([made, made.sin(), made * made], dim=1)
        loss: Tensor = judge(queries).float().mean()
        return loss

    for number in range(2):
        with critic.frozen():
            one.backward(through(one, critic.module, number, RANK), last=True)
        read = one.gradients()
        expected = {n: torch.zeros_like(p) for n, p in mine.named.items()}
        for rank in range(WORLD):
            mine.module.zero_grad()
            through(mine.module, theirs.module, number, rank).backward()
            for name, parameter in mine.module.named_parameters():
                if parameter.grad is not None:
                    expected[name] += parameter.grad.float() / WORLD
        found["gradients"] = max(found["gradients"], error(read, expected))
        one.step()
        mine.update(expected)
        with one.frozen():
            made = one.module(points.batch(number, RANK, 0, WORLD, dtype)[0]).detach()
            queries = torch.stack([made, made, made], dim=1)
            critic.backward(critic(queries).float().mean(), last=True)
            critic.step()
        theirs.module.zero_grad()
        total = {n: torch.zeros_like(p) for n, p in theirs.named.items()}
        for rank in range(WORLD):
            theirs.module.zero_grad()
            made = mine.module(points.batch(number, rank, 0, WORLD, dtype)[0]).detach()
            theirs.module(torch.stack([made, made, made], dim=1)).float().mean().backward()
            for name, parameter in theirs.module.named_parameters():
                if parameter.grad is not None:
                    total[name] += parameter.grad.float() / WORLD
        theirs.update(total)
    found["size"] = sum(float(g.norm()) for g in read.values())
    found["critic"] = error(masters(critic), dict(theirs.named))
    found["as before"] = [p.requires_grad for p in critic.module.parameters()].count(False) == 1
    found["still fixed"] = not fixed.requires_grad
    one.destroy()
    critic.destroy()
    return found


def teacher(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """A frozen engine: whole or shared, never trained, its rows still changeable."""
    from arctic_like.engine.ds_config import deepspeed_config

    module, plain = points.model(dtype), points.model(dtype).eval()
    config = deepspeed_config(
        section={"zero_optimization": {"stage": stage}}, dtype=dtype, micro_batch_size=1,
        gradient_accumulation_steps=1, world_size=WORLD, hidden_size=8, on_cpu=True,
    )  # fmt: skip
    one = Engine(module, optimizer=None, config=config)
    data = points.batch(0, 0, 1, 1, dtype)[0]
    with torch.no_grad():
        found: dict[str, Any] = {"output": torch.equal(one(data), plain(data))}
        found["again"] = torch.equal(one.module(data), plain(data))
        keep = torch.arange(0, 37, 2)
        one.resize({n: Rows(keep=keep) for n in ("points", "colors", "sharpness")})
        for name in ("points", "colors", "sharpness"):
            getattr(plain, name).data = getattr(plain, name).data[keep]
        found["pruned"] = torch.equal(one(data), plain(data))
    found["frozen"] = not any(p.requires_grad for p in one.module.parameters())
    found["refused"] = message(lambda: one.backward(torch.zeros(()), last=True))
    one.destroy()
    return found


def leaks(stage: int, dtype: str, *, times: int) -> dict[str, Any]:
    """Many operations: hooks, engines and tensors stay as many, and the steps right."""
    one = points.engine(stage, dtype, WORLD)
    step(one, 0, dtype)
    counted = []
    engines: list[Any] = []
    gc.collect()
    gc.disable()  # memory is free at once, not when the collector comes by
    for number in range(times):
        engines.append(weakref.ref(one.engine))
        one.resize({n: Rows(keep=torch.arange(30), new=torch.randn(
            7, *one.shapes()[n][1:], generator=torch.Generator().manual_seed(number)))
            for n in ("points", "colors", "sharpness")})  # fmt: skip
        step(one, number, dtype)
        if number % 9 == 0:
            counted.append(_count(one))
    gc.enable()
    gc.collect()
    alive = sum(engine() is not None for engine in engines)
    one.destroy()
    return {"counted": counted, "alive": alive}


def _count(one: Engine) -> list[int]:
    hooks = len(parameter_offload.FWD_MODULE_STACK)
    for module in one.module.modules():
        hooks += len(module._forward_hooks) + len(module._forward_pre_hooks)
    for parameter in one.module.parameters():
        hooks += len(getattr(parameter, "_post_accumulate_grad_hooks", None) or {})
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return [hooks, sum(held.values())]


def thrift(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """The same training as under DeepSpeed left as it is; what is held; what is in its files."""
    runs: list[Any] = []
    found: dict[str, Any] = {}
    for mended in (False, True):
        with contextlib.ExitStack() as stack:
            if not mended:
                stack.enter_context(patch.object(thrift_module, "save_memory", lambda _: None))
            one = points.engine(stage, dtype, WORLD, **options)
        norms = []
        for number in range(4):
            points.backward(one, number, RANK, WORLD, dtype)
            one.step()
            norms.append(float(one.grad_norm))
        weights = list(one.module.parameters())
        found["weights"], found["held"] = _bytes(weights), _bytes([*weights, *one.partitions()])
        found["partitions"] = _bytes(one.partitions())
        folder = FOLDER / f"thrift-{WORLD}-{stage}-{dtype}-{mended}"
        with (
            contextlib.nullcontext() if mended else patch.object(deepspeed_module, "Apart", _AsItIs)
        ):
            one.save(folder, tag="engine")
        files = {
            path.name: torch.load(path, weights_only=False)
            for path in sorted((folder / "engine").glob("*.pt"))
        }
        tensors = {f"{name} {n}": t for name, state in files.items()
                   for n, t in enumerate(tensors_in(state))}  # fmt: skip
        runs.append((masters(one), norms, tensors))
        found["in files"] = all(
            t.untyped_storage().nbytes() == t.numel() * t.element_size()
            for t in tensors.values() if t.numel()
        )  # fmt: skip
        one.host.barrier()
        one.destroy()
    (plain, plain_norms, plain_files), (own, norms, files) = runs
    found["bits"] = same_bits(plain, own) and plain_norms == norms
    found["same files"] = same_bits(plain_files, files)
    return found


class _AsItIs:
    """DeepSpeed's own writer."""

    def __new__(cls, writer: Any) -> Any:
        return writer


def _bytes(tensors: list[Any]) -> int:
    held = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in held}.values())


def refused(stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    """What does not fit, and ranks that disagree; afterwards the engine still trains."""
    one = points.engine(stage, dtype, WORLD, **options)
    step(one, 0, dtype)
    before = masters(one)
    cases: dict[str, Any] = {
        "name": {"pints": Rows()},
        "index": {"points": Rows(keep=torch.tensor([0, 37]))},
        "shape": {"points": Rows(new=torch.zeros(2, 2))},
        "empty": {"points": Rows(keep=torch.zeros(37, dtype=torch.bool))},
        "dtype": {"points": Rows(keep=torch.zeros(3))},
        "moment": {"points": Rows(new=torch.zeros(1, 3), moments={"velocity": torch.zeros(1, 3)})},
        "values": {"points": Rows(new=torch.full((1, 3), float(RANK)))},
        "rows": {"points": Rows(keep=torch.arange(5 + RANK))},
        "names": {"points": Rows()} if RANK == 0 else {"colors": Rows()},
        "one rank": {"points": Rows(keep=torch.tensor([0 if RANK == 0 else 99]))},
    }
    found: dict[str, Any] = {
        name: message(lambda rows=rows: one.resize(rows))  # type: ignore[misc]
        for name, rows in cases.items()
        if WORLD > 1 or name not in ("values", "rows", "names", "one rank")
    }
    points.backward(one, 1, RANK, WORLD, dtype)
    one.gradients_are = "partial"
    found["partial"] = message(lambda: one.resize({"points": Rows()}))
    one.gradients_are = "ready"
    found["untouched"] = same_bits(masters(one), before)
    one.step()
    one.destroy()
    return found


CHECKS = {
    check.__name__: check
    for check in (
        gradients, idle, later, surgery, nothing, save, load, mistaken, swapping, adversary, teacher,
        leaks, thrift, refused,
    )
}  # fmt: skip


def main() -> None:
    deepspeed.utils.logger.setLevel(logging.ERROR)
    host = connect(World.from_environment())
    found = []
    for job in json.loads(sys.argv[2]):
        result = CHECKS[job.pop("check")](**job)
        found.append(host.gather(result))
    if RANK == 0:
        (FOLDER / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    # as the worker does: threads of gloo may abort a process whose interpreter comes down around them
    os._exit(0)


if __name__ == "__main__":
    main()
