"""The page of `arctic-train profile`: `profile.md`, of 80 columns, and `profile.json`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from arctic_like.metrics.bottleneck import Finding, Operation, bottleneck
from arctic_like.rundir import write_atomically

WIDTH = 80
ROWS = 12
_MEASURED = {
    "data": "of the step is spent on getting the batch",
    "communication": "of the step is spent on exchanges and on waiting for other ranks",
    "optimizer": "of the step is the update",
    "launch": "of the step the device stands still, waiting for the host",
    "memory": "of the operators' time is spent on what moves memory rather than computes",
    "compute": "of the operators' time is matrix products and attention",
}


def write_page(
    folder: Path, *, recipe: str, device: str, ranks: int, steps: int, phases: Mapping[str, float],
    operations: Sequence[Operation], idle: float | None, memory: Mapping[str, float],
) -> Finding:  # fmt: skip
    """Write both files. phases: seconds a step, the ranks' mean; the rest is rank zero's."""
    found = bottleneck(phases, operations, idle=idle)
    total = sum(one.seconds for one in operations)
    content = {
        "recipe": recipe, "device": device, "ranks": ranks, "steps": steps,
        "step_time": sum(phases.values()), "phases": dict(phases), "idle": idle, **memory,
        "bottleneck": {"kind": found.kind, "share": found.share, "advice": list(found.advice)},
        "operations": [{**asdict(one), "share": one.seconds / total} for one in operations],
    }  # fmt: skip
    write_atomically(folder / "profile.json", json.dumps(content, indent=1) + "\n")
    measured = f"{device}; {ranks} {'rank' if ranks == 1 else 'ranks'}; {steps} steps"
    page = render(
        found, phases, operations, recipe=recipe, idle=idle, memory=memory, measured=measured
    )
    write_atomically(folder / "profile.md", page)
    return found


def render(
    found: Finding, phases: Mapping[str, float], operations: Sequence[Operation], *,
    recipe: str, measured: str, idle: float | None, memory: Mapping[str, float],
) -> str:  # fmt: skip
    """The page's text, Markdown."""
    step = sum(phases.values())
    lines = [f"# Profile of {recipe}"[:WIDTH], "", *_folded(f"Measured on {measured}."), ""]
    lines += _folded(f"**{found.title}**: {found.share:.0%} {_MEASURED[found.kind]}.")
    lines += [row for advice in found.advice for row in _folded(advice, first="- ", rest="  ")]
    if memory.get("retries"):
        retries = int(memory["retries"])
        sentence = (
            f"The device's memory was full {retries} times and had to be given back first: lower "
            "micro_batch_size, or spend less on activations, states or logits."
        )
        lines += _folded(sentence, first="- ", rest="  ")
    lines += ["", f"| {'phase':<16} | {'ms a step':>10} | {'share':>6} |", "|---|--:|--:|"]
    for name in sorted(phases, key=lambda name: -phases[name]):
        lines.append(f"| {name:<16} | {1e3 * phases[name]:>10.2f} | {phases[name] / step:>6.1%} |")
    lines.append(f"| {'step':<16} | {1e3 * step:>10.2f} | {1:>6.1%} |")
    if idle is not None:
        lines += ["", f"The device runs no kernel for {idle:.0%} of the traced steps."]
    if "peak_bytes" in memory:
        peak, kept = memory["peak_bytes"] / 2**30, memory["reserved_bytes"] / 2**30
        lines += ["", f"Memory of the device: {peak:.2f} GiB in use at most, {kept:.2f} GiB held."]
    total = sum(one.seconds for one in operations)
    lines += ["", f"| {'operation (its own time)':<44} | {'ms':>8} | {'share':>6} | {'calls':>7} |",
              "|---|--:|--:|--:|"]  # fmt: skip
    for one in operations[:ROWS]:
        name = one.name if len(one.name) <= 44 else one.name[:43] + "…"
        lines.append(
            f"| {name:<44} | {1e3 * one.seconds:>8.2f} | {one.seconds / total:>6.1%} | {one.calls:>7.0f} |"
        )
    lines += ["", *_folded("Operations are of the traced steps of rank zero, which the tracing itself "
                           "slows down; phases are of steps without it, the mean of the ranks.")]  # fmt: skip
    return "\n".join(lines) + "\n"


def _folded(text: str, *, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )
