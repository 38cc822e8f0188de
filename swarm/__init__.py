"""Being a peer: discovery, transport, verified fetch, store, cache tiers, dispatch and the transformers plug-in.

Importing this package makes converted directories loadable with transformers, in whichever order the two are imported,
and imports neither transformers nor torch: the plug-in registers itself when transformers' registry is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import wrapt

if TYPE_CHECKING:
    from .async_client import AsyncSwarm as AsyncSwarm
    from .async_client import join_async as join_async
    from .client import Swarm as Swarm
    from .client import join as join
    from .loading import load_expert as load_expert
    from .loading import open_local as open_local
    from .model.kv.cache import kv_cache as kv_cache
    from .model.kv.default import use_kv as use_kv
    from .model.kv.fidelity import logit_error as logit_error
    from .model.kv.options import KvOptions as KvOptions
    from .model.optimize import Optimized as Optimized
    from .model.optimize import optimize as optimize
    from .model.seats import routing_statistics as routing_statistics

# name -> module below this package; imported when first used
_EXPORTS: Final = {
    "AsyncSwarm": "async_client",
    "KvOptions": "model.kv.options",
    "Swarm": "client",
    "join": "client",
    "join_async": "async_client",
    "kv_cache": "model.kv.cache",
    "load_expert": "loading",
    "logit_error": "model.kv.fidelity",
    "open_local": "loading",
    "Optimized": "model.optimize",
    "optimize": "model.optimize",
    "routing_statistics": "model.seats",
    "use_kv": "model.kv.default",
}

__all__ = [
    "AsyncSwarm",
    "KvOptions",
    "Optimized",
    "Swarm",
    "join",
    "join_async",
    "kv_cache",
    "load_expert",
    "logit_error",
    "open_local",
    "optimize",
    "routing_statistics",
    "use_kv",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_plugin(_: object) -> None:
    import_module(f"{__name__}.model.plugin")


# The one effect of this import. Fires at once where transformers was imported before.
wrapt.register_post_import_hook(_register_plugin, "transformers.quantizers.auto")
