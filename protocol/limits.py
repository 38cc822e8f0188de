"""Every size that a peer, a file or a ticket may claim, in one place, each with the reason for its number.

A length from outside is compared with these before anything is allocated or read.
"""

from __future__ import annotations

# --- files -------------------------------------------------------------------------------------------------------
MAX_MANIFEST_BYTES = 64 << 20  # Kimi-K2 (23,040 experts) needs about 25 MiB
MAX_SHARDS = 1 << 18
MAX_TENSORS = 1 << 20
MAX_SHARD_BYTES = 16 << 30  # its chunk list is 512 KiB
MAX_DIMENSIONS = 8
MAX_FILE_NAME = 255
MAX_SAFETENSORS_HEADER = 100 << 20  # the limit of the safetensors library itself

# --- frames ------------------------------------------------------------------------------------------------------
MAX_META_BYTES = 64 << 10  # msgpack header of one message; the largest lists 384 experts and their row counts
MAX_PAYLOAD_BYTES = 64 << 20  # one frame of tensor rows or of file bytes; larger work is split by the sender
MAX_DETAIL_CHARS = 256  # free text in a refusal
MAX_LIST_ITEMS = 4096  # of one msgpack list: layers of an announcement
MAX_MAP_ITEMS = 32  # of one msgpack map: fields of a message

# --- sessions ----------------------------------------------------------------------------------------------------
MAX_REQUESTS_IN_FLIGHT = 64  # per stream; a peer that opens more is refused, then disconnected
MAX_CHUNKS_PER_REQUEST = 32  # 32 MiB
MAX_STREAMS_PER_PEER = 16
MAX_STREAMS = 2048  # of all peers
MAX_ARRIVING_BYTES = 512 << 20  # of unfinished frames on all streams of a node together
ALWAYS_TAKEN_BYTES = 256 << 10  # of an unfinished frame, whatever else arrives: so that small requests get through
HELLO_TIMEOUT = 10.0  # seconds a peer may take to say who it is (slow-loris)
MAX_DEADLINE = 600.0  # seconds; a longer one in a request is cut to this

# --- announcements -----------------------------------------------------------------------------------------------
MAX_RECORD_BYTES = 16 << 10  # 512 layers x 192 experts / 8 fit; hivemind's unary reply stops at 4 MiB for all peers
MAX_RECORD_LIFETIME = 600.0  # seconds; a later expiry is refused, so a lost peer's ghost is gone within 10 minutes
MAX_CLOCK_SKEW = 60.0  # seconds a record's issue time may lie in the future
MAX_ADDRESSES = 8
MAX_ADDRESS_CHARS = 256

# --- tickets -----------------------------------------------------------------------------------------------------
MAX_TICKET_CHARS = 8 << 10  # all its peers at their longest
MAX_TICKET_PEERS = 16
