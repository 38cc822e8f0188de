"""The one place that imports hivemind and py-libp2p, which cannot be imported side by side without help.

Both register the protobuf symbol `crypto.pb.KeyType` and the second one fails. They are made to share one generated
module (py-libp2p's: the same messages, two more key types). Both are slow to import (seconds: hivemind brings torch)
and change global state, so nothing is imported before it is asked for, and what they change is put back:

- hivemind prints through its own handler and renames the level WARNING to WARN; py-libp2p does not propagate.
  Afterwards their loggers are ordinary ones that propagate to the root, from WARNING up.
- hivemind switches torch to file-backed shared memory for all of the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

from moehive.protocol.errors import TransportError

_LIBP2P_KEYS = "libp2p.crypto.pb.crypto_pb2"
_HIVEMIND_KEYS = "hivemind.proto.crypto_pb2"


@cache
def import_hivemind() -> ModuleType:
    """The hivemind package. Raises TransportError when it is not installed."""
    _share_key_messages()
    torch_multiprocessing = importlib.import_module("torch.multiprocessing")
    sharing = torch_multiprocessing.get_sharing_strategy()
    with warnings.catch_warnings():  # what it uses of torch that is deprecated is no affair of whoever imports us
        warnings.simplefilter("ignore", DeprecationWarning)
        hivemind = _import("hivemind")
    torch_multiprocessing.set_sharing_strategy(sharing)
    importlib.import_module("hivemind.utils.logging").use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")
    logging.getLogger("hivemind").setLevel(logging.WARNING)
    return hivemind


@cache
def import_libp2p() -> ModuleType:
    """The py-libp2p package. Raises TransportError when it is not installed, or hivemind was imported by itself."""
    _share_key_messages()
    if sys.modules.get(_HIVEMIND_KEYS) is not sys.modules.get(_LIBP2P_KEYS):
        raise TransportError("hivemind was imported before moehive; import it with moehive.swarm.transport.engine")
    libp2p = _import("libp2p")
    logger = logging.getLogger("libp2p")
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return libp2p


def _share_key_messages() -> None:
    """Make `crypto_pb2` of both packages the same module, unless hivemind has loaded its own: that cannot be undone."""
    if _HIVEMIND_KEYS not in sys.modules:
        keys = sys.modules.get(_LIBP2P_KEYS) or _load_libp2p_keys()
        sys.modules[_LIBP2P_KEYS] = sys.modules[_HIVEMIND_KEYS] = keys


def _load_libp2p_keys() -> ModuleType:
    """py-libp2p's generated module without the package around it, whose import takes 1.5 s."""
    package = importlib.util.find_spec("libp2p")
    if package is None or package.origin is None:
        raise TransportError("libp2p is not installed; run: pip install libp2p")
    spec = importlib.util.spec_from_file_location(_LIBP2P_KEYS, Path(package.origin).parent / "crypto/pb/crypto_pb2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TransportError(f"cannot import {name} ({error}); run: pip install {name}") from error
