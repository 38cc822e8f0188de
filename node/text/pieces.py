"""Text from tokens that come one by one: what is certain at once, and nothing beyond a text to stop at.

Pure: knows neither models nor tokenizers, only a function that decodes tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

_UNKNOWN: Final = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no character (yet)
_UNFINISHED: Final = 3  # bytes that the beginning of a character can have
_WINDOW: Final = 64  # tokens that are decoded again and again while none of them ends a character
_CONTEXT: Final = 8  # of those, the ones that are kept then


class TextDecoder:
    """Pieces of text, which together are what `decode` makes of all tokens.

    Decoding looks at the tokens before, as the first one of a text may lose its space. So a window is decoded, which
    moves on wherever a token ends a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0  # tokens at the beginning of the window that are there for the others' sake
        self._said = 0  # characters of the window's text

    def feed(self, tokens: Sequence[int]) -> str:
        """What further tokens add. A character is held back until its last byte is there."""
        self._window += tokens
        text = self._decode(self._window)
        certain = len(text) - _trailing_unknown(text)
        piece, self._said = text[self._said : certain], max(self._said, certain)
        if certain == len(text):
            self._move(self._context)
        elif len(self._window) > _WINDOW:
            self._move(len(self._window) - _CONTEXT)
        return piece

    def end(self) -> str:
        """What was held back: bytes that are no characters."""
        piece = self._decode(self._window)[self._said :]
        self._window, self._context, self._said = [], 0, 0
        return piece

    def _move(self, start: int) -> None:
        self._window = self._window[start:]
        self._context = len(self._window)
        text = self._decode(self._window)
        self._said = len(text) - _trailing_unknown(text)


def _trailing_unknown(text: str) -> int:
    return min(len(text) - len(text.rstrip(_UNKNOWN)), _UNFINISHED)


class StopSearch:
    """Passes text on until the first of `stops` is complete. What may become one of them is held back.

    How the text is cut into pieces changes nothing. `with_stop`: the text that was found is passed on, too.
    """

    def __init__(self, stops: Sequence[str], *, with_stop: bool = False) -> None:
        self._stops = stops
        self._with_stop = with_stop
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What can be passed on; nothing more once a stop was found."""
        if self.found:
            return ""
        self._held += text
        hits = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            end, start = min(hits)
            self.found, passed, self._held = True, self._held[: end if self._with_stop else start], ""
            return passed
        keep = max((_beginning(self._held, stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def end(self) -> str:
        """What was held back in vain."""
        passed, self._held = self._held, ""
        return passed


def _beginning(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
