"""However tokens and texts are cut, the pieces are the whole, and nothing of a stop text is passed on too early."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moehive.swarm.text.pieces import StopSearch, TextDecoder

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def as_bytes(tokens: Sequence[int]) -> str:
    """A byte-level tokenizer: every token is a byte."""
    return bytes(tokens).decode(errors="replace")


def as_words(tokens: Sequence[int]) -> str:
    """One that puts a space before every word but the first of what it decodes."""
    return " ".join(f"w{token}" for token in tokens)


def cut(whole: Sequence[int] | str, cuts: list[int]) -> list:
    edges = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    return [whole[start:end] for start, end in pairwise(edges)]


@given(st.text(), st.lists(st.integers(0, 200), max_size=40))
@example("€" * 100, list(range(200)))
def test_pieces_are_the_text_and_hold_whole_characters(text: str, cuts: list[int]) -> None:
    decoder = TextDecoder(as_bytes)
    pieces = [decoder.feed(tokens) for tokens in cut(text.encode(errors="replace"), cuts)]
    pieces.append(decoder.end())

    assert "".join(pieces) == text.encode(errors="replace").decode()
    if UNKNOWN not in text:
        assert all(UNKNOWN not in piece for piece in pieces)


@given(st.binary(max_size=300))
@example(b"\xff" * 300)
@example(b"\xe2\x82" + b"\xff" * 100 + "€".encode())
def test_bytes_that_are_no_characters_are_passed_on_too(data: bytes) -> None:
    decoder = TextDecoder(as_bytes)
    pieces = [decoder.feed([byte]) for byte in data]

    assert len("".join(pieces)) >= as_bytes(data).count("") - 1 - 3, "no more than three are held back"
    assert "".join(pieces) + decoder.end() == as_bytes(data)


def test_a_character_is_held_back_where_each_of_its_bytes_counts_as_unknown() -> None:
    """As with tokenizers that fall back to bytes."""

    def decode(tokens: Sequence[int]) -> str:
        text = as_bytes(tokens)
        return UNKNOWN * len(tokens) if UNKNOWN in text else text

    decoder = TextDecoder(decode)
    assert [decoder.feed([byte]) for byte in "🜁".encode()] == ["", "", "", "🜁"]


@given(st.lists(st.integers(0, 9), max_size=30))
def test_a_token_is_decoded_in_the_light_of_the_one_before(tokens: list[int]) -> None:
    decoder = TextDecoder(as_words)

    assert "".join(decoder.feed([token]) for token in tokens) == as_words(tokens)


def test_garbage_without_end_does_not_make_every_token_dearer() -> None:
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return as_bytes(tokens)

    decoder = TextDecoder(decode)
    for _ in range(1000):
        decoder.feed([0xFF])
    assert longest < 100


# --- texts to stop at -----------------------------------------------------------------------------------------------


def search(pieces: list[str], stops: list[str], *, with_stop: bool = False) -> tuple[str, bool]:
    found = StopSearch(stops, with_stop=with_stop)
    passed = [found.feed(piece) for piece in pieces]
    return "".join([*passed, found.end()]), found.found


@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 50), max_size=20),
    st.booleans(),
)
@example("abc", ["abc", "b"], [1, 2], False)
@example("abc", ["abc", "b"], [], False)
def test_cuts_change_nothing_and_the_first_to_end_counts(
    text: str, stops: list[str], cuts: list[int], with_stop: bool
) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    end, start = min(ends, default=(len(text), len(text)))

    assert search(cut(text, cuts), stops, with_stop=with_stop) == (text[: end if with_stop else start], bool(ends))


@pytest.mark.parametrize(
    ("pieces", "passed"),
    [(["one", " tw", "o"], ["one", "", ""]), (["one", " t", "wig"], ["one", "", " twig"]), ([" ", " two"], ["", " "])],
)
def test_only_what_may_become_the_stop_is_held_back(pieces: list[str], passed: list[str]) -> None:
    found = StopSearch([" two"])

    assert [found.feed(piece) for piece in pieces] == passed


def test_after_the_stop_nothing_more_is_passed_on() -> None:
    found = StopSearch(["x"])

    assert (found.feed("axb"), found.feed("c"), found.end(), found.found) == ("a", "", "", True)
