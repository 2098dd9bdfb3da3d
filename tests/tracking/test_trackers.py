"""TensorBoard read back, wandb with a stand-in and offline, failures that do no harm."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from arctic_like.errors import RecipeError
from arctic_like.registry import lookup
from arctic_like.tracking.base import Guarded, Tracker, TrackerConfig
from arctic_like.tracking.tensorboard import TensorBoardConfig, TensorBoardTracker
from arctic_like.tracking.wandb import WandbTracker, WandbTrackerConfig


def start(tracker, folder, state=None):
    tracker.start(
        run_name="one", recipe={"type": "sft"}, output_dir=folder, total_steps=10, state=state or {}
    )
    return tracker


def tensorboard(folder, state=None):
    return start(TensorBoardTracker(TensorBoardConfig(type="tensorboard")), folder, state)


def read_back(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_reads_back(tmp_path):
    assert lookup("tracker", "tensorboard") is TensorBoardTracker
    tracker = tensorboard(tmp_path)
    for step in (1, 2):
        tracker.scalars(step, {"loss": 1.0 / step, "note": "text", "eval/loss": np.float64(step)})
    tracker.text(2, "sample", "hello")
    tracker.table(2, "answers", ["prompt", "answer"], [["1+1", 2], ["a|b", "x\ny"]])
    tracker.image(2, "square", np.zeros((4, 5), np.uint8))
    tracker.image(2, "colour", np.zeros((4, 5, 3), np.float32))
    tracker.finish(0)
    events = read_back(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert [e.value for e in events.Scalars("eval/loss")] == [1.0, 2.0]
    assert {"sample/text_summary", "answers/text_summary"} <= {*events.Tags()["tensors"]}
    assert (events.Images("square")[0].height, events.Images("square")[0].width) == (4, 5)
    assert "note" not in events.Tags()["scalars"]


def test_tensorboard_hides_steps_that_are_done_again(tmp_path):
    killed = tensorboard(tmp_path)
    for step in range(1, 6):
        killed.scalars(step, {"loss": -1.0})
        if step == 3:
            state = killed.state()
    killed.finish(1)
    resumed = tensorboard(tmp_path, state)
    for step in range(4, 7):
        resumed.scalars(step, {"loss": float(step)})
    resumed.finish(0)
    seen = [(e.step, e.value) for e in read_back(tmp_path).Scalars("loss")]
    assert seen == [(1, -1.0), (2, -1.0), (3, -1.0), (4, 4.0), (5, 5.0), (6, 6.0)]


@pytest.mark.parametrize(
    ("module", "tracker", "extra"),
    [
        ("torch.utils.tensorboard.writer", TensorBoardTracker(TensorBoardConfig()), "tensorboard"),
        ("wandb", WandbTracker(WandbTrackerConfig()), "wandb"),
    ],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module, tracker, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=rf"pip install 'arctic-like\[{extra}\]'"):
        start(Guarded(tracker), tmp_path)


class FakeWandb(SimpleNamespace):
    """The few things of wandb that the tracker uses; keeps what it was told."""

    def __init__(self, *, mode="online", key="k"):
        super().__init__(inits=[], lines=[], ended=[], axes=[], api=SimpleNamespace(api_key=key))
        self.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode))

    def init(self, **values):
        self.inits.append(values)
        return SimpleNamespace(
            id=values["id"] or "made-up",
            log=self.lines.append,
            define_metric=lambda name, **how: self.axes.append((name, how)),
            finish=lambda exit_code: self.ended.append(exit_code),
        )

    def Table(self, columns, data):
        return ("table", columns, data)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def wandb(folder, state=None, **config):
    return start(WandbTracker(WandbTrackerConfig(type="wandb", **config)), folder, state)


def test_wandb_resumes_its_run(tmp_path, fake):
    first = wandb(tmp_path, project="p", entity="e", name="n")
    first.scalars(5, {"loss": 1.0})
    state = first.state()
    second = wandb(tmp_path, state, project="p")
    second.scalars(4, {"loss": 2.0})
    second.table(4, "t", ["a"], [(1,)])
    second.finish(3)
    assert fake.inits[0]["id"] is None
    assert {k: fake.inits[0][k] for k in ("project", "entity", "name")} == {
        "project": "p", "entity": "e", "name": "n"}  # fmt: skip
    assert fake.inits[0]["config"] == {"type": "sft"}
    assert (fake.inits[1]["id"], fake.inits[1]["resume"]) == ("made-up", "allow")
    assert fake.inits[1]["name"] == "one"
    # Our step is a value, not wandb's: a step that is done again may be smaller than the last.
    assert ("*", {"step_metric": "step"}) in fake.axes
    assert fake.lines == [
        {"step": 5, "loss": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 4, "t": ("table", ["a"], [[1]])},
    ]
    assert fake.ended == [3]


def test_wandb_without_a_key_is_refused_before_it_could_ask(tmp_path, fake):
    fake.api.api_key = None
    with pytest.raises(RecipeError, match="WANDB_MODE=offline"):
        wandb(tmp_path)
    assert fake.inits == []
    fake.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline"))
    wandb(tmp_path)
    assert len(fake.inits) == 1


@pytest.mark.full
def test_the_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = wandb(tmp_path, project="p")
    tracker.scalars(1, {"loss": 1.0})
    tracker.text(1, "sample", "hello")
    tracker.image(1, "square", np.zeros((4, 5, 3), np.uint8))
    state = tracker.state()
    tracker.finish(0)
    assert state["id"]
    again = wandb(tmp_path, state, project="p")
    assert again.state() == state
    again.scalars(1, {"loss": 1.0})
    again.finish(0)
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(state["id"] in file.name for file in files)


class Broken(Tracker):
    """Fails in every method."""

    config_type = TrackerConfig

    def __init__(self, at):
        super().__init__(TrackerConfig())
        self.at, self.calls = at, 0

    def start(self, **values):
        if self.at == "start":
            raise ConnectionError("no network")

    def scalars(self, step, values):
        self.calls += 1
        raise ConnectionError("no network")

    state = finish = text = table = image = scalars  # type: ignore[assignment]


@pytest.mark.parametrize(("at", "calls"), [("start", 0), ("later", 3)])
def test_a_failing_tracker_warns_once_and_the_run_goes_on(tmp_path, at, calls):
    from loguru import logger

    said: list[str] = []
    sink = logger.add(said.append, format="{level} {message}")
    broken = Broken(at)
    guarded = Guarded(broken)
    start(guarded, tmp_path)
    for step in range(3):
        guarded.scalars(step, {})
    assert guarded.state() == {}
    guarded.text(1, "a", "b")
    guarded.table(1, "a", ["b"], [])
    guarded.image(1, "a", None)
    guarded.finish(0)
    logger.remove(sink)
    assert len(said) == 1
    assert "no network" in said[0]
    assert said[0].startswith("WARNING")
    assert broken.calls >= calls
