"""Where options come from besides the command line: the environment, then a TOML file.

A key of the file that no command has is an error. Variables that no option has are not: others set them too
(Kubernetes gives every pod MOEHIVE_NODE_PORT where a service is called moehive-node).
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cyclopts.config import Dict, Env

from moehive.protocol.errors import ConfigError, StorageError

PREFIX = "MOEHIVE_"

Source = Env | Dict


def config_sources(chosen: Path | None, usual: Path, *, commands: Collection[str]) -> Sequence[Source]:
    """The sources in falling order of precedence; the file is `chosen`, or else `usual` where that exists.

    Raises ConfigError for a file that is not what it should be, StorageError for one that cannot be read.
    """
    environment = Env(PREFIX, show=False)
    path = chosen or usual
    if chosen is None and not usual.exists():
        return [environment]
    return [environment, Dict(_read(path, commands), source=str(path))]


def _read(path: Path, commands: Collection[str]) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the configuration file {path} does not exist") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise ConfigError(f"the configuration file {path} is no file: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    tables = ", ".join(f"[{command}]" for command in commands)
    for key, value in settings.items():
        if key not in commands:
            raise ConfigError(f"{path}: unknown key {key!r}; there are tables for commands: {tables}")
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {key!r} must be a table: write [{key}] and its options below")
    return settings
