"""What the routing kernels need of a GPU, read from code compiled for it: no spills, few registers, wide loads."""

import pytest

pytest.importorskip("triton")
from support.aot import SHARED_LIMIT, Report, compile_all
from support.aot_route import ALIGN, ROUTE, ROUTERS

pytestmark = pytest.mark.timeout(400)  # compiling takes half a minute of processor time, on whatever else is going on


@pytest.fixture(scope="module")
def route_reports() -> dict[str, Report]:
    return compile_all(ROUTE)


@pytest.fixture(scope="module")
def align_reports() -> dict[str, Report]:
    return compile_all(ALIGN)


@pytest.mark.parametrize("build", ROUTE, ids=lambda build: build.name)
def test_routers_stay_in_registers(route_reports: dict[str, Report], build: object) -> None:
    report = route_reports[build.name]  # type: ignore[attr-defined]
    assert report.stack == 0
    assert report.registers <= 128
    if report.name.startswith("route"):  # a warp needs no shared memory to agree, but for a word to change layouts
        assert report.shared <= 512
        assert report.instructions <= 3000


@pytest.mark.parametrize("name", ["Qwen3-Next", "DeepSeek-V3", "Kimi-K2"])
def test_logits_of_many_experts_are_loaded_wide(route_reports: dict[str, Report], name: str) -> None:
    width = 4 if ROUTERS[name].correction_bias else 2  # bytes of a logit
    loads = ROUTERS[name].num_experts * width / 32 / 16  # of 16 bytes, for each lane
    assert route_reports[f"route {name} sm_90"].wide_loads >= loads


@pytest.mark.parametrize("build", ALIGN, ids=lambda build: build.name)
def test_aligning_and_combining_do_not_spill(align_reports: dict[str, Report], build: object) -> None:
    report = align_reports[build.name]  # type: ignore[attr-defined]
    assert report.stack == 0
    assert report.shared <= min(SHARED_LIMIT[build.sm], 64 * 1024)  # type: ignore[attr-defined]


@pytest.mark.parametrize("build", [build for build in ALIGN if "combine" in build.name], ids=lambda build: build.name)
def test_rows_are_combined_in_wide_loads(align_reports: dict[str, Report], build: object) -> None:
    report = align_reports[build.name]  # type: ignore[attr-defined]
    assert report.wide_loads >= build.arguments["TOP_K"] * build.arguments["SPLITS"]  # type: ignore[attr-defined]
    if build.arguments["SPLITS"] == 1:  # type: ignore[attr-defined]  # split sums have more loads in flight
        assert report.registers <= 64
