"""Where things are kept: the platform's usual places, or all below MOEHIVE_HOME.

The identity lies with the data, not in the cache: cleaning a cache must not change who a peer is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from moehive.protocol.ids import ModelId


@dataclass(frozen=True, slots=True)
class Paths:
    """Directories of this user; none is created here."""

    config: Path
    data: Path
    cache: Path

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Paths:
        """As the environment says."""
        home = environment.get("MOEHIVE_HOME")
        if home:
            return cls(Path(home, "config"), Path(home, "data"), Path(home, "cache"))
        dirs = platformdirs.PlatformDirs("moehive", appauthor=False)
        return cls(dirs.user_config_path, dirs.user_data_path, dirs.user_cache_path)

    @property
    def identity(self) -> Path:
        """A node's key."""
        return self.data / "identity.key"

    @property
    def settings(self) -> Path:
        """The configuration file."""
        return self.config / "config.toml"

    @property
    def store(self) -> Path:
        """Objects fetched from the swarm."""
        return self.cache / "store"

    @property
    def nodes(self) -> Path:
        """What the nodes that run now say about themselves."""
        return self.cache / "nodes"

    def skeleton(self, model: ModelId) -> Path:
        """A fetched model's dense part and tokenizer, as a Hugging Face directory."""
        return self.cache / "models" / model
