import numpy as np
import pytest

from moehive.swarm.prefetch.history import DECAYS, PARTS, REACH, advance, empty_history, histories


def test_a_first_token_has_nothing_before_it() -> None:
    assert empty_history(3).tolist() == [[0.0] * 3] * PARTS


def test_the_last_token_and_decayed_means() -> None:
    first, second = np.array([[1.0, 0.0]], np.float32), np.array([[0.0, 2.0]], np.float32)
    after = advance(advance(empty_history(2), first), second)
    assert after[0].tolist() == [0.0, 2.0]
    for part, decay in enumerate(DECAYS, 1):
        assert after[part] == pytest.approx([decay * (1 - decay), 2 * (1 - decay)])


@pytest.mark.parametrize("tokens", [2, 7, REACH + 40])
def test_many_tokens_at_once_are_like_one_after_the_other(tokens: int) -> None:
    rows = np.random.default_rng(0).standard_normal((tokens, 4)).astype(np.float32)
    one_by_one = empty_history(4) + 1
    for row in rows:
        one_by_one = advance(one_by_one, row[None])
    assert advance(empty_history(4) + 1, rows) == pytest.approx(one_by_one, abs=1e-4)


def test_histories_of_consecutive_tokens_begin_anew_with_each_session() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    starts = np.zeros(200, np.bool_)
    starts[[0, 3, 130]] = True
    before, now = histories(rows, starts), empty_history(3)
    for token in range(200):
        now = empty_history(3) if starts[token] else now
        assert before[token] == pytest.approx(now, abs=1e-5)
        now = advance(now, rows[token : token + 1])
