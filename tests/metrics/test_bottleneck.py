"""What holds a step up, from numbers alone."""

from __future__ import annotations

import pytest

from arctic_like.metrics.bottleneck import Finding, Operation, bottleneck, idle_share

PRODUCT = Operation("aten::mm", 0.4, 10)
COPY = Operation("aten::copy_", 0.1, 30)
STEP = {"data": 0.01, "forward": 0.3, "backward": 0.6, "optimizer": 0.09}


@pytest.mark.parametrize(
    ("phases", "operations", "idle", "kind", "share"),
    [
        (STEP, [PRODUCT, COPY], None, "compute", 0.8),
        (STEP, [PRODUCT, Operation("aten::_softmax", 0.5, 3)], None, "memory", 5 / 9),
        (STEP, [PRODUCT], 0.1, "compute", 1.0),
        (STEP, [PRODUCT], 0.5, "launch", 0.49),
        ({**STEP, "data": 1.01}, [PRODUCT], None, "data", 1.01 / 2),
        ({**STEP, "data": 1.01}, [PRODUCT], 0.6, "data", 1.01 / 2),
        ({**STEP, "communication": 0.5}, [PRODUCT], 0.4, "communication", 1 / 3),
        ({**STEP, "optimizer": 0.6}, [PRODUCT], None, "optimizer", 0.6 / 1.51),
    ],
)
def test_the_largest_part_that_is_no_computation_holds_it_up_else_what_operators_do(
    phases: dict[str, float], operations: list[Operation], idle: float | None, kind: str, share: float,
) -> None:  # fmt: skip
    found = bottleneck(phases, operations, idle=idle)
    assert (found.kind, found.share) == (kind, pytest.approx(share))
    assert found.title == f"{kind}-bound"
    assert found.advice


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no time"):
        bottleneck({"data": 0.0}, [])


def test_kernels_of_nvidia_and_of_triton_are_told_apart() -> None:
    names = {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN": True,
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": True,
        "void flash::flash_fwd_kernel<...>": True,
        "void at::native::vectorized_elementwise_kernel<4, ...>": False,
        "_rms_norm_forward_kernel": False,
        "aten::addmm": True,
        "aten::native_dropout": False,
    }
    assert {name: Operation(name, 1.0, 1.0).is_product for name in names} == names


def test_a_device_is_idle_where_no_kernel_runs_however_they_overlap() -> None:
    kernels = [(4.0, 6.0), (0.0, 2.0), (1.0, 3.0), (5.0, 5.5), (9.0, 14.0)]
    assert idle_share(kernels, begin=0.0, end=10.0) == pytest.approx(0.4)


def test_findings_are_those_with_advice() -> None:
    assert Finding("launch", 0.5).advice[0].startswith("Give the device more")
