"""Who a peer is: an Ed25519 key, kept in a file that only its owner can read.

The file holds the libp2p protobuf `PrivateKey` in the form that the go-libp2p daemon reads (64 bytes of key data: seed
and public key), so other libp2p programs can use it. A key that others could have read is refused, not repaired:
whoever read it can sign as this peer.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moehive.protocol.errors import ConfigError, StorageError
from moehive.protocol.ids import PeerId, peer_id_of

_SEED_BYTES = 32
# protobuf {1: KeyType.Ed25519 = 1, 2: 64 bytes} (libp2p specification, peer-ids)
_PRIVATE_KEY_PREFIX = bytes.fromhex("08011240")
_PRIVATE_KEY_BYTES = len(_PRIVATE_KEY_PREFIX) + 64


@dataclass(frozen=True, slots=True)
class Identity:
    """An Ed25519 key pair and the peer id that follows from it."""

    seed: bytes = field(repr=False)  # 32 bytes, secret
    public_key: bytes  # 32 bytes
    peer: PeerId

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte Ed25519 seed."""
        assert len(seed) == _SEED_BYTES, len(seed)
        public_key = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
        return cls(seed, public_key, peer_id_of(public_key))

    @classmethod
    def ephemeral(cls) -> Identity:
        """A new identity that is never stored."""
        return cls.from_seed(secrets.token_bytes(_SEED_BYTES))

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Read the identity stored at `path`; create it, readable by its owner only, when there is none.

        Several processes may call this at once: all get the same identity. Raises ConfigError for a file that others
        can read or that holds something else, StorageError when it cannot be read or written.
        """
        try:
            return cls._load(path)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, NotADirectoryError) as error:
            raise ConfigError(f"the identity {path} is no file: {error.strerror}") from error
        except OSError as error:
            raise StorageError(f"cannot read the identity {path}: {error.strerror}") from error
        try:
            _create_exclusively(path, cls.ephemeral().to_libp2p())
            return cls._load(path)
        except OSError as error:
            raise StorageError(f"cannot write the identity {path}: {error.strerror}") from error

    @classmethod
    def from_libp2p(cls, data: bytes) -> Identity:
        """Read what `to_libp2p` wrote. Raises ConfigError for anything else."""
        if len(data) != _PRIVATE_KEY_BYTES or not data.startswith(_PRIVATE_KEY_PREFIX):
            raise ConfigError("not an Ed25519 libp2p private key")
        key = data[len(_PRIVATE_KEY_PREFIX) :]
        identity = cls.from_seed(key[:_SEED_BYTES])
        if identity.public_key != key[_SEED_BYTES:]:
            raise ConfigError("the private and the public half of the key do not belong together")
        return identity

    def to_libp2p(self) -> bytes:
        """The libp2p protobuf `PrivateKey` message: 68 secret bytes."""
        return _PRIVATE_KEY_PREFIX + self.seed + self.public_key

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature over `message`; `protocol.ids.verify_signature` checks it."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(message)

    @classmethod
    def _load(cls, path: Path) -> Identity:
        with path.open("rb") as file:
            # Of the open file, not of the path: nobody can exchange it between the check and the read.
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_PRIVATE_KEY_BYTES + 1)
        try:
            identity = cls.from_libp2p(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; name another file, or move it away to get a new identity") from error
        if mode & 0o077:
            raise ConfigError(f"the identity {path} is readable by other users; run: chmod 600 {path}")
        return identity


def _create_exclusively(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all; leave a file that is already there alone. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was faster: its identity counts
            os.link(temporary, path)  # unlike a rename, it never replaces
    finally:
        temporary.unlink()
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
