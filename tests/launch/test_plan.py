"""What is started: the launcher's options, devices and threads, without starting anything."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like import stop
from arctic_like.cli import devices
from arctic_like.cli.launch import plan
from arctic_like.cli.launcher_options import FLAGS, VALUED, parse_launcher_options
from arctic_like.engine.host import free_port
from arctic_like.errors import RecipeError

WORKER = "arctic_like.worker"


def make(options, *, gpus=0, own=None):
    return plan(parse_launcher_options(options), gpus=gpus, worker=WORKER, own=own or {})


def test_the_table_is_the_installed_launchers():
    import inspect
    import re

    from deepspeed.launcher import runner

    theirs = set(re.findall(r'"(--[a-z_]+)"', inspect.getsource(runner.parse_args)))
    assert theirs == {*VALUED, *FLAGS}


def deepspeed_reads(program):
    """What DeepSpeed's own parser makes of a planned command line."""
    from deepspeed.launcher import runner

    assert program[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.runner"]
    return runner.parse_args(program[4:])


@pytest.mark.parametrize(
    ("options", "gpus", "processes"),
    [
        (["--num_gpus", "2"], 0, 2),
        (["--num_gpus=2"], 4, 2),
        (["--master_port", "1234"], 0, 1),
        (["--master_port", "1234"], 4, -1),
        ([], 4, -1),
        (["--include", "localhost:1,3"], 4, -1),
    ],
)
def test_the_launcher_receives_what_was_given(options, gpus, processes):
    read = deepspeed_reads(make(options, gpus=gpus)[0])
    assert (read.user_script, read.module, read.no_local_rank) == (WORKER, True, True)
    assert read.num_gpus == processes
    assert read.log_level == "critical"
    assert read.master_port == (1234 if "1234" in options else read.master_port)
    assert 1024 < read.master_port < 32768 or read.master_port == 1234


@pytest.mark.parametrize("words", [["--log_level", "info"], ["-q"], ["--quiet"]])
def test_the_launchers_voice_is_the_users_choice(words):
    program, _ = make(["--num_gpus", "2", *words])
    assert "critical" not in program


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_local_process_needs_no_launcher(gpus, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    program, environment = make([], gpus=gpus)
    assert program == [sys.executable, "-u", "-m", WORKER]
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert ("DS_ACCELERATOR" in environment) == (gpus == 0)


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)
    assert make(["--num_gpus", "3"])[1]["OMP_NUM_THREADS"] == "2"
    assert make(["--num_gpus", "16"])[1]["OMP_NUM_THREADS"] == "1"
    assert make([])[1]["OMP_NUM_THREADS"] == "8"
    assert "OMP_NUM_THREADS" not in make(["--num_gpus", "3"], gpus=4)[1]
    assert "OMP_NUM_THREADS" not in make(["--num_gpus", "2", "--bind_cores_to_rank"])[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in make(["--num_gpus", "2"])[1]


def test_other_nodes_learn_our_environment(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    own = {"ARCTIC_OVERRIDES": json.dumps(['a="b c"', "d={e: 'f'}"]), "ARCTIC_RESUME": ""}
    program, environment = make(["--hostfile", str(hosts)], own=own)
    read = deepspeed_reads(program)
    assert read.master_port == 29500  # a port that is free here says nothing about the first node
    assert "DS_ACCELERATOR" not in environment
    argv = ["worker", *read.user_args]
    assert all(" " not in word and '"' not in word for word in argv)
    for name in own:
        monkeypatch.delenv(name, raising=False)
    stop._adopt_environment(argv)
    assert argv == ["worker"]
    assert {name: stop.os.environ[name] for name in own} == own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_gpus", "2", "optimizer.lr=1"], "before the first --option"),
        (["--num_gpsu", "2"], "did you mean --num_gpus"),
        (["--num_gpus", "two"], "invalid int value"),
        (["--num_gpus", "0"], "not a number of processes"),
        (["--num_gpus"], "expected one argument"),
        (["--no_python"], "--no_python"),
        (["--autotuning", "run"], "--autotuning"),
    ],
)
def test_what_the_launcher_would_not_take(options, message):
    with pytest.raises(RecipeError, match=message):
        parse_launcher_options(options)


@pytest.mark.parametrize(
    ("visible", "files", "count"),
    [(None, 4, 4), ("", 4, 0), ("-1", 4, 0), ("0,2", 4, 2), ("1,-1,2", 4, 1), ("0,1", 0, 0),
     ("GPU-aa,GPU-bb", 8, 2), ("MIG-cc", 8, 1)],
)  # fmt: skip
def test_visible_gpus(monkeypatch, visible, files, count):
    monkeypatch.setattr(devices, "_torch_has_gpu_support", lambda: True)
    monkeypatch.setattr(devices, "_device_files", lambda: list(range(files)))
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.visible_gpus() == count


def test_a_torch_for_cpu_sees_none(monkeypatch):
    import torch

    built_for_gpu = torch.version.cuda is not None or torch.version.hip is not None
    assert devices._torch_has_gpu_support() == built_for_gpu


def test_free_port_is_free():
    import socket

    with socket.socket() as taken:
        taken.bind(("", free_port()))


@given(st.dictionaries(st.text(), st.text().filter(lambda t: "\0" not in t)))
def test_environment_argument_is_one_plain_word(values):
    word = stop.environment_argument(values)
    assert set(word) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=+")
