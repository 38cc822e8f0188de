"""A checkpoint on the Hugging Face hub: small files through the hub's cache, ranges of the large ones as needed.

Everything goes through huggingface_hub, so that its settings (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME) hold, and
weights that lie in its cache already are read there. A branch is resolved once, to the commit it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
)

from moehive.protocol.errors import CheckpointError, SeedError
from moehive.swarm.convert.assets import SMALL_FILES
from moehive.swarm.convert.layout import Span
from moehive.swarm.convert.reading import SourceFiles
from moehive.swarm.convert.writing import Part
from moehive.swarm.threads import is_unwanted

RESUMES = 4  # times that a broken transfer is taken up again; a request that fails is repeated by huggingface_hub
_PARTIAL_CONTENT = 206
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")
# The HTTP client's own; which client it is depends on the version of huggingface_hub.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_HUB_ERRORS = (OSError, ValueError, _HTTP_ERROR)


class HubFiles:
    """A SourceReader over one commit of a repository. `directory` holds its small files, and perhaps large ones."""

    def __init__(self, repo: str, commit: str, directory: Path) -> None:
        self._repo = repo
        self._commit = commit
        self._directory = directory
        self._here = SourceFiles(directory)

    def head(self, file: str, count: int) -> tuple[bytes, int]:
        """See SourceReader."""
        if self._is_here(file):
            return self._here.head(file, count)
        data = bytearray(count)
        size = self._fill(file, 0, memoryview(data))
        return bytes(data[:size]), size

    def read_part(self, file: str, offset: int, out: memoryview) -> Part:
        """See SourceReader."""
        if self._is_here(file):
            return self._here.read_part(file, offset, out)
        size = self._fill(file, offset, out)
        if offset + len(out) > size:
            raise CheckpointError(
                f"{file} of {self._repo} has {size} bytes only: it is not the file that was planned with"
            )
        return Part(out)

    def read(self, span: Span) -> bytearray:
        """See SourceReader."""
        out = bytearray(span.size)
        self.read_part(span.file, span.offset, memoryview(out))
        return out

    def close(self) -> None:
        """Close what is open."""
        self._here.close()

    def _is_here(self, file: str) -> bool:
        return (self._directory / file).is_file()

    def _fill(self, file: str, offset: int, out: memoryview) -> int:
        """Fill `out` with the file's bytes from `offset` on, as far as it reaches; the size of the file."""
        filled = 0
        for _ in range(1 + RESUMES):
            count, size = self._receive(file, offset + filled, out[filled:])
            filled += count
            if filled == min(len(out), size - offset):
                return size
        raise CheckpointError(f"{file} of {self._repo}: the hub broke off at byte {offset + filled}, again and again")

    def _receive(self, file: str, offset: int, out: memoryview) -> tuple[int, int]:
        """One request: bytes that came, which may be fewer than were asked for, and the size of the file."""
        url = hf_hub_url(self._repo, file, revision=self._commit)
        # identity: a compressed answer would be a range of something else
        headers = {"Range": f"bytes={offset}-{offset + len(out) - 1}", "Accept-Encoding": "identity"}
        headers |= build_hf_headers(library_name="moehive")
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
                hf_raise_for_status(answer)
                total = _TOTAL.fullmatch(answer.headers.get("content-range", ""))
                if answer.status_code != _PARTIAL_CONTENT or total is None:
                    raise CheckpointError(f"{file} of {self._repo}: the hub does not send ranges of files")
                filled = 0
                with suppress(_HTTP_ERROR):  # broken off: huggingface_hub repeats only what fails at the start
                    for piece in answer.iter_bytes():
                        if is_unwanted():
                            raise CheckpointError(f"{file} of {self._repo}: given up")
                        out[filled : filled + len(piece)] = piece[: len(out) - filled]
                        filled = min(filled + len(piece), len(out))
                return filled, int(total[1])
        except (OSError, _HTTP_ERROR) as error:
            raise CheckpointError(f"{file} of {self._repo}: {_first_line(error)}") from error


def open_snapshot(name: str, repo: str, revision: str | None) -> tuple[HubFiles, Path]:
    """One commit of a repository and the directory of its small files, downloaded unless cached. Raises SeedError."""
    try:
        with _without_bars():
            directory = Path(snapshot_download(repo, revision=revision, allow_patterns=list(SMALL_FILES)))
    except _HUB_ERRORS as error:
        raise SeedError(f"seed {name}: {_first_line(error)}") from error
    return HubFiles(repo, directory.name, directory), directory


@contextmanager
def _without_bars() -> Iterator[None]:
    """Our own progress is about the model's bytes, and goes to terminals only."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
