"""How long answers may be, and what wishes mean."""

from __future__ import annotations

import pytest

from moehive.node.api.errors import ApiError
from moehive.node.api.limits import Limits, sampling_of
from moehive.node.api.schema import Wishes

PROMPT = (1, 2, 3, 4)
LIMITS = Limits(context=10, vocabulary=100)


def most(wished: int | None, limits: Limits = LIMITS) -> int:
    return sampling_of(Wishes("m", wished), PROMPT, limits).max_tokens


def test_an_answer_fills_the_context_unless_it_is_bounded():
    assert most(None) == most(6) == 6
    assert most(None, Limits(10, 100, max_tokens=3)) == 3
    assert most(None, Limits(10, 100, max_tokens=30)) == 6
    assert most(None, Limits(None, 100, max_tokens=30)) == 30
    assert most(None, Limits(None, 100)) == 4096
    assert most(2, Limits(10, 100, max_tokens=3)) == 2


def test_what_is_usual_is_no_wish_that_could_be_too_large():
    def usually(limits: Limits) -> int:
        return sampling_of(Wishes("m", usual_tokens=16), PROMPT, limits).max_tokens

    assert usually(Limits(100, 100)) == usually(Limits(None, 100)) == 16
    assert usually(LIMITS) == 6
    assert usually(Limits(100, 100, max_tokens=3)) == 3


@pytest.mark.parametrize(
    ("wished", "limits", "code"),
    [
        (7, LIMITS, "context_length_exceeded"),
        (None, Limits(4, 100), "context_length_exceeded"),
        (4, Limits(10, 100, max_tokens=3), None),
        (1, Limits(10, 4), None),
    ],
)
def test_what_does_not_fit_is_refused_and_never_cut(wished, limits, code):
    with pytest.raises(ApiError) as caught:
        most(wished, limits)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ApiError, match="empty"):
        sampling_of(Wishes("m"), (), LIMITS)


def test_wishes_become_sampling():
    sampling = sampling_of(Wishes("m", 5, 0.5, 0.9, 3, -7, ("x",)), PROMPT, LIMITS)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 3, -7)
    assert (sampling.stop, sampling.with_stop) == (("x",), False)

    for cold in (0.0, 1e-8, 1e-300):
        greedy = sampling_of(Wishes("m", temperature=cold, top_p=1.0), PROMPT, LIMITS)
        assert greedy.arguments()["do_sample"] is False

    seeds = {sampling_of(Wishes("m"), PROMPT, LIMITS).seed for _ in range(5)}
    assert len(seeds) > 1, "a new one each time"
