"""Build hook: makes `pip install -e .` work although the packages are renamed on their way into the wheel.

The folders `swarm`, `node`, `kernels` and `protocol` become `moehive.swarm` and so on. Hatchling refuses an editable
install with such a prefix, so this hook links each folder as `.editable/moehive/<name>`, and `dev-mode-dirs` puts
`.editable` on the path by a plain `.pth` file: Python, mypy, editors and import-linter all see it without import hooks.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LinkFolders(BuildHookInterface[BuilderConfig]):
    """Links the source folders under their import names when the editable wheel is built; does nothing for others."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version != "editable":
            return
        root = Path(self.root)
        for folder, package in self.build_config.sources.items():
            link = root / ".editable" / package.rstrip("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(root / folder.rstrip("/"), target_is_directory=True)
