"""Starts `weights_probe` on real processes and reads what its checks found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.tools import environment, free_port

ROOT = Path(__file__).parents[2]
Found = dict[str, list[dict[str, Any]]]
"""Name of a job → what each rank found."""


def probe(jobs: list[dict[str, Any]], *, ranks: int, folder: Path) -> Found:
    """Run checks one after another in one launch. A job is {"check": name, …its arguments}."""
    script, listing = str(Path(__file__).with_name("weights_probe.py")), json.dumps(jobs)
    command = [sys.executable, script, str(folder), listing]
    if ranks > 1:
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks),
            "--master_port", str(free_port()), "--no_local_rank", *command[1:],
        ]  # fmt: skip
    (folder / "found.json").unlink(missing_ok=True)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        timeout=580, check=False,
    )  # fmt: skip
    told = done.stdout[-3000:] + done.stderr[-6000:]
    assert done.returncode == 0, told
    assert (folder / "found.json").exists(), told
    found = json.loads((folder / "found.json").read_text())
    assert len(found) == len(jobs)
    assert all(len(each) == ranks for each in found)
    return {name_of(job): each for job, each in zip(jobs, found, strict=True)}


def job(check: str, stage: int, dtype: str, **options: Any) -> dict[str, Any]:
    return {"check": check, "stage": stage, "dtype": dtype, **options}


def name_of(job: dict[str, Any]) -> str:
    """A job's name in a test's id: check-stage-dtype and its options."""
    options = "-".join(str(key) for key, value in job.items() if key not in MAIN and value)
    return f"{job['check']}-{job['stage']}-{job['dtype']}" + (f"-{options}" if options else "")


MAIN = ("check", "stage", "dtype")

EVERY_STAGE = [(stage, dtype, {}) for stage in range(4) for dtype in ("fp32", "bf16")]
OFFLOAD = [(stage, dtype, {"offload": True}) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]
VARIANTS: list[tuple[int, str, dict[str, Any]]] = [
    (0, "bf16", {"fused": True}),
    (1, "fp32", {"round_robin_gradients": True}),
    (2, "bf16", {"round_robin_gradients": True}),
    (2, "fp32", {"overlap_comm": True}),
    (3, "bf16", {"sub_group_size": 50}),
    (3, "fp32", {"stage3_param_persistence_threshold": 1}),
    (3, "bf16", {"offload": True, "offload_param": {"device": "cpu"}}),
]


def rounding(job: dict[str, Any]) -> float:
    """The relative error that is allowed. DeepSpeed sums bf16 gradients in bf16 at stage 0."""
    return 2e-2 if (job["stage"], job["dtype"]) == (0, "bf16") else 1e-4


# What every run of the tests looks at, in one launch on two ranks; the matrices are marked `full`.
GRADIENTS = [
    job("gradients", 0, "bf16"), job("gradients", 1, "bf16"), job("gradients", 2, "fp32"),
    job("gradients", 3, "bf16"), job("gradients", 2, "bf16", offload=True),
    job("gradients", 3, "fp32", offload=True), job("idle", 1, "bf16"),
    job("idle", 2, "fp32", offload=True), job("idle", 2, "bf16", offload=True),
    job("idle", 3, "fp32", offload=True), job("idle", 3, "bf16"),
    job("later", 0, "bf16"),
    job("later", 2, "bf16"),
    job("later", 3, "fp32"),
    job("adversary", 0, "fp32"), job("adversary", 2, "fp32"), job("adversary", 3, "fp32"),
    job("teacher", 2, "bf16"), job("teacher", 3, "bf16"),
]  # fmt: skip
SURGERY = [
    job("surgery", 0, "bf16"), job("surgery", 1, "bf16"), job("surgery", 2, "fp32"),
    job("surgery", 3, "fp32"), job("surgery", 2, "bf16", offload=True),
    job("nothing", 1, "bf16"), job("nothing", 2, "bf16"), job("nothing", 3, "bf16"),
    job("swapping", 0, "bf16"), job("swapping", 2, "bf16"), job("swapping", 3, "bf16"),
    job("refused", 0, "fp32"), job("refused", 3, "fp32"),
    job("leaks", 2, "bf16", times=10), job("leaks", 3, "bf16", times=10),
]  # fmt: skip
THRIFT = [
    job("thrift", 1, "fp32"), job("thrift", 2, "fp32"),
    job("thrift", 2, "fp32", round_robin_gradients=True), job("thrift", 2, "bf16"),
    job("thrift", 3, "fp32"), job("thrift", 2, "fp32", offload=True),
]  # fmt: skip
SAVED = [(0, "fp32"), (2, "bf16"), (3, "bf16")]
SAVES = [job("save", stage, dtype) for stage, dtype in SAVED]
