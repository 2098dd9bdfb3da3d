"""What this machine has, found without importing torch: GPUs and cores."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path


def visible_gpus() -> int:
    """GPUs that torch would see here; 0 if the installed torch is a build for CPU."""
    if not _torch_has_gpu_support():
        return 0
    present = len(_device_files())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))
    if chosen is None:
        return present
    # As CUDA reads it: the list ends at the first entry that is no device ("-1" hides all).
    entries = []
    for entry in (part.strip() for part in chosen.split(",")):
        if not entry or entry.startswith("-"):
            break
        entries.append(entry)
    return min(len(entries), present) if all(e.isdigit() for e in entries) else len(entries)


def _device_files() -> list[Path]:
    """One device file per GPU. In a container only those that were passed in."""
    nvidia = [p for p in Path("/dev").glob("nvidia[0-9]*") if re.fullmatch(r"nvidia\d+", p.name)]
    # Windows' Linux layer has one file for all; ROCm has a render node for each.
    return nvidia or list(Path("/dev").glob("dxg")) or _rocm_devices()


def _rocm_devices() -> list[Path]:
    return list(Path("/dev/dri").glob("renderD*")) if Path("/dev/kfd").exists() else []


def _torch_has_gpu_support() -> bool:
    """Read torch/version.py as text: `cuda` and `hip` are None in a build for CPU."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    try:
        text = (Path(next(iter(spec.submodule_search_locations))) / "version.py").read_text()
    except OSError:
        return True  # an unusual build; the devices decide
    return bool(re.search(r"^(cuda|hip)\b[^=\n]*=\s*['\"]", text, re.MULTILINE))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its control group."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no control group (version 2), or "max": no quota
    return cores
