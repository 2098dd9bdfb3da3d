"""Stands in for arctic_like.worker: does what STAND_IN says, without torch."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

folder = Path(os.environ["STAND_IN_DIR"])
rank = os.environ.get("RANK", "?")
(folder / f"importing-{rank}").write_text(str(os.getpid()))
mode, _, argument = os.environ["STAND_IN"].partition(":")
if mode == "import":
    time.sleep(600)

from arctic_like.stop import StopRequest, install_rank_guards, report_exit  # noqa: E402

install_rank_guards()
if mode == "children":
    if os.fork() == 0:
        time.sleep(600)
    mode = "run"
if mode == "environment":
    names = [n for n in os.environ if n.startswith(("ARCTIC_", "OMP_", "MASTER_", "RANK", "WORLD_",
                                                    "LOCAL_", "DS_ACC", "CUDA_V"))]  # fmt: skip
    (folder / f"environment-{rank}").write_text("\n".join(f"{n}={os.environ[n]}" for n in names))
(folder / f"running-{rank}").write_text(str(os.getpid()))

if mode == "run":
    stop = StopRequest.from_environment()
    while not (asked := stop.requested()):
        time.sleep(0.02)
    (folder / f"stopped-{rank}").write_text(str(asked))
    report_exit(128 + asked)
    sys.exit(128 + asked)
if mode == "deaf":
    time.sleep(600)
if mode == "codes":
    code = int(argument.split(",")[int(rank)])
    if code == -9:
        os.kill(os.getpid(), 9)
    if code == -1:
        time.sleep(600)
    report_exit(code)
    sys.exit(code)
if mode == "raise":
    raise SystemError("no report")
report_exit(0)
