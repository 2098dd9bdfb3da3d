"""Cross-entropy in tiles against full logits: time and peak memory of forward and backward of head and loss.

    python benchmarks/loss.py                    # or: --device cuda --dtype bf16 --json out.json

Both begin with the same hidden states and end with the gradients of hidden states and weight. *full* is what
a model with a head does: logits of every place in the model's dtype, float32, cross-entropy. The runs
alternate; what is compared are medians. Memory is what is held beyond the inputs at the worst moment:
of the process on a CPU (Linux), of the allocator on CUDA. A head that is frozen, as with
adapters, has lines of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def problem(arguments: argparse.Namespace, share: float, *, frozen: bool) -> dict[str, Any]:
    """Hidden states, a weight, and targets of which a share is trained."""
    import torch

    torch.manual_seed(0)
    tokens = arguments.rows * arguments.length
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    made = {"dtype": dtype, "device": arguments.device}
    targets = torch.randint(arguments.vocabulary, (tokens,), device=arguments.device)
    targets[torch.rand(tokens, device=arguments.device) >= share] = -100
    hidden = torch.randn(tokens, arguments.hidden, **made).requires_grad_()
    weight = torch.randn(arguments.vocabulary, arguments.hidden, **made) / arguments.hidden**0.5
    return {"hidden": hidden, "weight": weight.requires_grad_(not frozen), "targets": targets}


def full(hidden: Any, weight: Any, targets: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def tiled(hidden: Any, weight: Any, targets: Any) -> Any:
    from arctic_like.kernels.linear_loss import linear_cross_entropy_sum

    return linear_cross_entropy_sum(hidden, weight, targets).total


def each(hidden: Any, weight: Any, targets: Any) -> Any:
    from arctic_like.kernels.linear_loss import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets).sum()


KINDS: dict[str, Callable[..., Any]] = {"full": full, "tiled": tiled, "each": each}


def _resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the mark was set back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def once(compute: Callable[..., Any], given: dict[str, Any], device: str) -> tuple[float, int]:
    """(seconds, bytes) of one forward and backward."""
    import torch

    cuda = device.startswith("cuda")
    given["hidden"].grad = given["weight"].grad = None
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    begun = time.perf_counter()
    loss = compute(**given)
    (loss / len(given["targets"])).backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    return seconds, peak - before


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: as torch has it")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = []
    for share in (0.25, 1.0):
        for frozen in (False, True):
            given = problem(arguments, share, frozen=frozen)
            found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in KINDS}
            for number in range(arguments.repeat + 1):
                for kind, compute in KINDS.items():
                    one = once(compute, given, arguments.device)
                    if number:  # the first warms up
                        found[kind].append(one)
            seconds = {k: statistics.median(one[0] for one in v) for k, v in found.items()}
            held = {k: statistics.median(one[1] for one in v) for k, v in found.items()}
            head = "frozen" if frozen else "trained"
            for kind in KINDS:
                print(
                    f"{share:4.0%} trained, head {head:7}  {kind:5}  {1000 * seconds[kind]:8.1f} ms "
                    f"({seconds[kind] / seconds['full']:.2f})  {held[kind] / 2**20:8.1f} MiB "
                    f"({held[kind] / held['full']:.2f})"
                )
                results.append(
                    {"share": share, "head": head, "kind": kind, "seconds": seconds[kind],
                     "bytes": held[kind]}
                )  # fmt: skip
    if arguments.json:
        setting = {k: str(v) for k, v in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"setting": setting, "results": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
