"""What DeepSpeed holds twice is held once, and trains the same: beside DeepSpeed left as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arctic_like.engine import thrift
from tests.engine.launch import THRIFT, Found, job, name_of, probe


def correct(job: dict[str, Any], found: dict[str, Any]) -> None:
    assert found["bits"]
    if job["stage"] < 3:  # there DeepSpeed fills up shares with what it finds in memory
        assert found["same files"]
    assert found["in files"]  # a share of the weights is not written as all of them
    once = job["dtype"] == "fp32" and job["stage"] in (1, 2) and not job.get("offload")
    expected = found["weights"] + (0 if once else found["partitions"])
    assert found["held"] == expected


@pytest.mark.full
@pytest.mark.parametrize("job", THRIFT, ids=name_of)
def test_two_ranks(two_ranks: Found, job: dict[str, Any]) -> None:
    for found in two_ranks[name_of(job)]:
        correct(job, found)


def test_one_rank(tmp_path: Path) -> None:
    jobs = [job("thrift", 1, "fp32"), job("thrift", 2, "fp32"), job("thrift", 2, "bf16")]
    for one, (found,) in zip(jobs, probe(jobs, ranks=1, folder=tmp_path).values(), strict=True):
        correct(one, found)


def test_norms_are_those_of_whole_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all elements once, each with its parameter, in float64; what fills up a share is left out."""
    monkeypatch.setattr(thrift, "NORM_PIECE", {"cpu": 7})
    sizes: list[int] = []

    def norm(gradients: Any, params: Any, norm_type: int = 2) -> Any:
        pairs = list(zip(gradients, params, strict=True))
        sizes.extend(len(gradient) for gradient, _ in pairs)
        owned = [gradient for gradient, owner in pairs if owner == "counted"]
        return torch.stack([g.double().norm(norm_type) for g in owned]).norm(norm_type)

    kind = type("DeepSpeedZeroOptimizer_Stage3", (SimpleNamespace,), {})
    optimizer = kind(get_grad_norm_direct=norm)
    thrift.save_memory(optimizer)
    torch.manual_seed(0)
    first, padding, left_out, last = (
        torch.randn(5, 4),
        torch.ones(3),
        torch.randn(9),
        torch.randn(8),
    )
    padding._zero_padding = True  # type: ignore[attr-defined]
    found = optimizer.get_grad_norm_direct(
        [first, padding, left_out, last.t()], ["counted", "left out", "counted"]
    )
    expected = torch.cat([first.reshape(-1), last]).double().norm()
    assert abs(float(found) - float(expected)) < 1e-12
    assert sizes == [7, 7, 6, 7, 2, 7, 1]


COUNTED = """
import torch
calls = []
def compile(function):
    calls.append(function.__name__)
    return function
torch.compile = compile
from arctic_like.engine.thrift import compile_muon_when_used
compile_muon_when_used()
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5 as orthogonal
from deepspeed.runtime import compiler
assert calls == [] and compiler.compile() is compile
torch.manual_seed(0)
found = [orthogonal(torch.randn(6, 6), steps=5) for _ in range(2)]
assert calls == ["zeropower_via_newtonschulz5"], calls
singular = torch.linalg.svdvals(found[0].float())
assert 0.3 < singular.min() and singular.max() < 1.5, singular
print("as it should be")
"""


def test_muon_is_compiled_when_it_is_called() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNTED], capture_output=True, text=True, check=False
    )
    assert "as it should be" in done.stdout, done.stderr
