"""What every permanent seed offers, and how users name one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import ConfigError, SeedChanged
from moehive.protocol.ids import ShardHash

_HUB = "hub:"
_REPO = re.compile(r"(?:[A-Za-z0-9._-]+/)?[A-Za-z0-9._-]+")
_REVISION = re.compile(r"[A-Za-z0-9._/-]+")


class Seed(Protocol):
    """Objects of one model that can be made here. Methods block, and may be called from any thread."""

    @property
    def name(self) -> str:
        """As the user named it."""

    def offers(self, object_hash: ShardHash) -> bool:
        """Whether it is worth asking for an object. Costs nothing, promises nothing."""

    def chunk_list(self, object_hash: ShardHash) -> ChunkList:
        """The chunk hashes of an object all of whose bytes were just verified. Raises SeedError, SeedChanged."""

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """Bytes of an object, of whole chunks: verified where its chunk list was asked for before.

        Whoever takes them verifies them in any case, and calls `refute` where they are wrong. Raises SeedError,
        SeedChanged.
        """

    def refute(self, object_hash: ShardHash) -> SeedChanged:
        """An object's bytes were found to be wrong: it is not offered any more. The error to be raised."""

    def close(self) -> None:
        """Give files up."""


@dataclass(frozen=True, slots=True)
class SeedName:
    """A seed as the user names it: a directory, or a repository of the hub at some revision."""

    text: str
    directory: Path | None = None
    repo: str = ""
    revision: str | None = None  # None: the hub's main branch as of now


def parse_seed(text: str) -> SeedName:
    """Read "DIR", "hub:REPO" or "hub:REPO@REVISION". Raises ConfigError."""
    if not text.startswith(_HUB):
        directory = Path(text)
        if not directory.is_dir():
            raise ConfigError(
                f"seed {text}: no such directory; a repository of the hub is written hub:NAME/MODEL@REVISION"
            )
        return SeedName(text, directory=directory)
    repo, at, revision = text.removeprefix(_HUB).partition("@")
    if _REPO.fullmatch(repo) is None or (at and _REVISION.fullmatch(revision) is None):
        raise ConfigError(f"seed {text}: write for example hub:Qwen/Qwen3-30B-A3B, or with @ and a revision behind it")
    return SeedName(text, repo=repo, revision=revision or None)
