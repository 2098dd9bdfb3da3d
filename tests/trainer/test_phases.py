"""Time by phase: what the clocks add up, on a host and on a device that is behind it, and in real runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from arctic_like.api import execute
from arctic_like.recipe import load_recipe
from arctic_like.stop import StopRequest
from arctic_like.trainer.phases import STEP, DeviceWatch, HostWatch, Phases
from tests.integration.tools import (
    drive,
    recipe,
    train_lines,
    write_conversations,
    write_recipe,
)


def test_a_host_watch_counts_each_phase_and_nothing_between() -> None:
    now = [10.0]
    watch = HostWatch(lambda: now[0])
    for phase, seconds in (("data", 1.0), ("forward", 2.0), (None, 4.0), ("data", 8.0)):
        watch.lap(phase)
        now[0] += seconds
    assert watch.read() == {"data": 9.0, "forward": 2.0}
    now[0] += 16.0
    assert watch.read() == {"data": 16.0}, "the phase under way goes on"


class Device:
    """A stream that reaches an event when the host lets it."""

    def __init__(self) -> None:
        self.recorded: list[float] = []
        self.reached, self.waits, self.made = 0, 0, 0
        self.time = 0.0

    def event(self) -> Any:
        device = self
        device.made += 1

        class Event:
            def record(self, stream: Any) -> None:
                self.number = len(device.recorded)
                device.recorded.append(device.time)

            def query(self) -> bool:
                return self.number < device.reached

            def synchronize(self) -> None:
                device.waits += 1
                device.reached = len(device.recorded)

            def elapsed_time(self, other: Any) -> float:
                assert self.query(), "an event was read before the device had passed it"
                assert other.query(), "an event was read before the device had passed it"
                return 1e3 * (device.recorded[other.number] - device.recorded[self.number])

        return Event()


@pytest.mark.parametrize("keeps_up", [False, True])
def test_a_device_watch_waits_at_a_line_alone_and_reads_no_event_too_early(keeps_up: bool) -> None:
    device = Device()
    watch = DeviceWatch(device.event)
    for step in range(1000):
        for phase, seconds in (("data", 0.25), ("forward", 1.0), ("backward", 2.0), (None, 8.0)):
            watch.lap(phase)
            device.time += seconds
        device.reached = len(device.recorded) - 4 if keeps_up else 0
        assert device.waits == 0, step
    assert watch.read() == {"data": 250.0, "forward": 1000.0, "backward": 2000.0}
    assert device.waits == 1
    if keeps_up:
        assert device.made < 600, "events that were passed are used again"
    assert watch.read() == {}


def test_within_an_evaluation_nothing_counts_as_a_part_of_a_step() -> None:
    phases = Phases()
    assert phases.begin("forward") == "stopped"
    assert phases.current == "stopped", "a forward of an evaluation at the start is no step's"
    phases.start()
    began = time.perf_counter()
    with phases.during("stopped"), phases.during("evaluation"):
        with phases.during("communication"):
            assert phases.current == "evaluation"
        with phases.during("checkpoint"):
            time.sleep(0.2)
        time.sleep(0.1)
    took = time.perf_counter() - began
    assert phases.current == "other"
    line = phases.read(1)
    assert sum(line[f"time/{phase}"] for phase in STEP) < 0.1
    assert line["time/checkpoint"] >= 0.2
    assert line["time/evaluation"] >= 0.1
    assert line["time/checkpoint"] + line["time/evaluation"] <= took
    assert set(phases.read(1)) == {f"time/{phase}" for phase in STEP}


def test_a_change_of_phase_costs_less_than_a_thousandth_of_50_milliseconds() -> None:
    """Six changes a step with one micro-batch, and two for each further one."""
    phases = Phases()
    phases.start()
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            for phase in ("data", "communication", "forward", "backward", "optimizer", "other"):
                phases.begin(phase)
            with phases.during("stopped"):
                pass
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 50e-6


def run(content: dict[str, Any], folder: Path, inspect: Any = None) -> Path:
    path = write_recipe(folder / "recipe.yaml", content)
    execute(load_recipe(path), output_dir=folder / "run", resume="", stop=StopRequest(),
            inspect=inspect)  # fmt: skip
    return folder / "run"


def test_the_phases_of_a_run_are_its_step_time(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl")
    content = recipe(
        data, train_iters=6, train_log_iter_interval=2, eval_interval=3, micro_batch_size=2,
        gradient_accumulation_steps=2, data__train_eval_split=[0.9, 0.1],
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 3}],
        model__config__hidden_size=128, model__config__intermediate_size=512,
    )  # fmt: skip
    slow = {"loss": 0.03, "on_optimizer_step_start": 0.02, "weight": 0.005, "on_step_end": 0.01}

    def slow_down(trainer: Any) -> None:
        for name, seconds in slow.items():
            method = getattr(trainer, name)

            def later(*values: Any, method: Any = method, seconds: float = seconds) -> Any:
                time.sleep(seconds)
                return method(*values)

            setattr(trainer, name, later)

    began = time.perf_counter()
    folder = run(content, tmp_path, slow_down)
    took = time.perf_counter() - began
    found = train_lines(folder)
    assert [line["step"] for line in found] == [2, 4, 6]
    for line in found:
        parts = {phase: line[f"time/{phase}"] for phase in STEP}
        assert sum(parts.values()) == pytest.approx(line["step_time"], rel=0.05, abs=1e-3)
        assert parts["forward"] > 2 * slow["loss"]
        assert parts["optimizer"] > slow["on_optimizer_step_start"]
        assert parts["data"] > 2 * slow["weight"]
        assert parts["other"] > slow["on_step_end"]
        assert parts["backward"] > 0
    assert ["time/checkpoint" in line for line in found] == [False, True, False]
    assert ["time/evaluation" in line for line in found] == [False, True, False]
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    in_steps = sum(line["step_time"] * 2 for line in found)
    assert sum(seconds[phase] for phase in STEP) == pytest.approx(in_steps, rel=0.05)
    assert seconds["checkpoint"] > found[1]["time/checkpoint"], "the last one has no line"
    assert sum(seconds.values()) < took


@pytest.mark.full
def test_a_rank_that_waits_for_another_waits_in_communication(tmp_path: Path) -> None:
    """Rank 1 sleeps in its forward: rank 0, whose lines these are, meets it in the gradients' reduction."""
    data = write_conversations(tmp_path / "data.jsonl")
    (tmp_path / "train.py").write_text(
        "import time\n"
        "from arctic_like.trainer.sft import SFTTrainer\n\n"
        "class Late(SFTTrainer):\n"
        "    name = 'late'\n\n"
        "    def loss(self, batch):\n"
        "        time.sleep(0.2 * self.world.rank)\n"
        "        return super().loss(batch)\n"
    )
    content = recipe(data, type="late", train_iters=4, train_log_iter_interval=2)
    path = write_recipe(tmp_path / "recipe.yaml", content)
    stages = (0, 2, 3)
    drive(
        [{"recipe": str(path), "output_dir": str(tmp_path / f"run-{stage}"),
          "overrides": [f"deepspeed.zero_optimization.stage={stage}"]} for stage in stages],
        ranks=2, folder=tmp_path,
    )  # fmt: skip
    for stage in stages:
        line = train_lines(tmp_path / f"run-{stage}")[-1]
        parts = {phase: line[f"time/{phase}"] for phase in STEP}
        assert sum(parts.values()) == pytest.approx(line["step_time"], rel=0.05), stage
        assert parts["communication"] > 0.15, (stage, parts)
        assert parts["forward"] < 0.15, (stage, parts)
