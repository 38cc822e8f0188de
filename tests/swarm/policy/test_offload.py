"""Waiting for an upload, or computing meanwhile."""

from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.policy.offload import Costs, uploads_to_await

SECONDS = st.floats(1e-6, 1e-1)


def seconds(rows: list[int], costs: Costs, awaited: int) -> float:
    return max(awaited * costs.upload, sum(costs.on_processor(number) for number in rows[awaited:]))


@given(
    rows=st.lists(st.integers(1, 500), max_size=12), most=st.integers(0, 12), upload=SECONDS, few=SECONDS, row=SECONDS
)
def test_no_other_division_is_quicker(rows: list[int], most: int, upload: float, few: float, row: float) -> None:
    costs = Costs(upload, few, row)
    chosen = uploads_to_await(rows, costs, most)
    assert 0 <= chosen <= min(most, len(rows))
    assert all(seconds(rows, costs, chosen) <= seconds(rows, costs, other) for other in range(min(most, len(rows)) + 1))


def test_both_work_at_the_same_time() -> None:
    assert uploads_to_await([1, 1, 1, 1], Costs(upload=1e-3, few=1e-3), 4) == 2
    assert uploads_to_await([1, 1, 1, 1], Costs(upload=1.0, few=1e-3), 4) == 0
    assert uploads_to_await([1, 1, 1, 1], Costs(upload=1e-6, few=1e-3), 2) == 2, "no more than are possible"


def test_a_prompt_is_not_left_to_a_processor_of_which_nothing_is_known() -> None:
    assert uploads_to_await([300, 200], Costs(upload=1e-3), 2) == 2
    assert uploads_to_await([300, 200], Costs(upload=1e-3, few=1e-3), 2) == 2
    assert uploads_to_await([300, 200], Costs(upload=1.0, few=1e-3, row=1e-5), 2) == 0


def test_what_is_measured_is_smoothed() -> None:
    costs = Costs().measured(1, 1.0).measured(1, 2.0).measured(100, 50.0)
    assert costs == Costs(0.0, 1.1, 0.5)
    assert costs.on_processor(100) == 50.0
