"""The exact bytes of everything that is stored or sent: a change here is a new version of the format, never a fix.

Where such a change is meant: raise the version it belongs to, then print the new bytes with `.hex()`.
"""

from __future__ import annotations

import pytest
from support.wire import ALL_MESSAGES, MODEL, SECRET, peer, private_key

from moehive.protocol.codec import Message, decode
from moehive.protocol.frames import FrameDecoder
from moehive.protocol.ids import ExpertKey, ModelId, ShardHash
from moehive.protocol.inventory import Inventory, decode_inventory, directory_key, encode_inventory
from moehive.protocol.manifest import (
    ExpertFfn,
    Gate,
    Manifest,
    ModelFacts,
    Quantization,
    QuantMethod,
    ShardEntry,
    ShardType,
    TensorEntry,
)
from moehive.protocol.messages import (
    EXPERT,
    PEER,
    SHARD,
    BulkOffer,
    Cancel,
    Chunk,
    ChunkHashes,
    Demand,
    ExpertsDone,
    GetChunkList,
    GetChunks,
    GetDemand,
    GetHave,
    GetInventory,
    GetLoad,
    Have,
    Hello,
    Load,
    OpenBulk,
    Refused,
    RunExperts,
    Welcome,
)
from moehive.protocol.messages import Inventory as InventoryReply
from moehive.protocol.proofs import Admission
from moehive.protocol.session import ClientSession, ServerSession
from moehive.protocol.ticket import Ticket

PROOF = bytes(range(100, 132))
HASH = ShardHash(MODEL)
SAMPLES: tuple[Message, ...] = (
    Hello(agent="moehive/1", proof=PROOF),
    Welcome(agent="moehive/1", proof=PROOF),
    Refused(code=1, detail="later", retry_after=1.5),
    Cancel(),
    GetInventory(model=ModelId(MODEL)),
    InventoryReply(),
    GetLoad(),
    Load(queued_requests=1, expected_wait=0.25, rows_done=1 << 40, bytes_sent=3),
    GetDemand(model=ModelId(MODEL)),
    Demand(layers=(0, 60), experts=(3, 255), hourly=(7200, 90)),
    GetChunkList(hash=HASH),
    ChunkHashes(size=1 << 20),
    GetChunks(hash=HASH, first=300, count=32),
    Chunk(index=300),
    GetHave(hash=HASH),
    Have(size=3 << 20, complete=False),
    OpenBulk(),
    BulkOffer(addresses=("/ip4/10.0.0.1/tcp/4002",), fingerprint=PROOF, token=bytes(32), lifetime=30.0),
    RunExperts(
        model=ModelId(MODEL),
        layer=7,
        tokens=2,
        hidden=4,
        dtype="BF16",
        weights_dtype="F32",
        form="sum",
        experts=(1, 130),
        counts=(2, 1),
        deadline=2.0,
    ),
    ExpertsDone(waited=0.0, computed=0.5),
)
INVENTORY = Inventory(
    peer=peer(1),
    model=ModelId(MODEL),
    issued=1.8e9,
    expires=1.8e9 + 90,
    held=frozenset({ExpertKey(0, 0), ExpertKey(2, 0), ExpertKey(2, 4)}),
    skeleton=True,
    complete=True,
    loading=True,
    addresses=("/ip4/10.0.0.1/tcp/4001",),
    rows_per_second=1000.0,
)
TICKET = Ticket(SECRET, (f"/ip4/10.0.0.1/tcp/4001/p2p/{peer(1)}",))
MANIFEST = Manifest(
    model=ModelFacts(
        name="tiny \u00e9",
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        dtype="BF16",
        hidden_size=4,
        intermediate_size=2,
        num_experts=1,
        top_k=1,
        moe_layers=(1,),
        ffn=ExpertFfn(gate=Gate.CLAMPED_INTERLEAVED, activation="silu", alpha=1.702, limit=7.0),
        quantization=Quantization(QuantMethod.FP8_BLOCK, (128, 128)),
    ),
    shards=(
        ShardEntry("dense/0.safetensors", ShardType.DENSE, 64, HASH),
        ShardEntry("experts/1_0.safetensors", ShardType.EXPERT, 32, HASH, expert_key=ExpertKey(1, 0)),
    ),
    tensors={
        "b.weight": TensorEntry(shard=1, offset=16, size=16, shape=(2, 4), dtype="BF16"),
        "a.weight": TensorEntry(shard=0, offset=32, size=8, shape=(2,), dtype="F32"),
    },
)

# --- the bytes ----------------------------------------------------------------------------------------------------

FRAMES = {
    "Hello": (
        "0101000100000102000000390000000782a56167656e74a96d6f65686976652f31a570726f6f66c4206465666768696a"
        "6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182837061796c6f6164"
    ),
    "Welcome": (
        "0102000100000102000000390000000782a56167656e74a96d6f65686976652f31a570726f6f66c4206465666768696a"
        "6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182837061796c6f6164"
    ),
    "Refused": (
        "0103000100000102000000290000000783a4636f646501a664657461696ca56c61746572ab72657472795f6166746572"
        "cb3ff80000000000007061796c6f6164"
    ),
    "Cancel": "01040001000001020000000100000007807061796c6f6164",
    "GetInventory": (
        "0110000100000102000000490000000781a56d6f64656cd9406162616261626162616261626162616261626162616261"
        "62616261626162616261626162616261626162616261626162616261626162616261626162616261627061796c6f6164"
    ),
    "Inventory": "01110001000001020000000100000007807061796c6f6164",
    "GetLoad": "01120001000001020000000100000007807061796c6f6164",
    "Load": (
        "0113000100000102000000480000000784af7175657565645f726571756573747301ad65787065637465645f77616974"
        "cb3fd0000000000000a9726f77735f646f6e65cf0000010000000000aa62797465735f73656e74037061796c6f6164"
    ),
    "GetDemand": (
        "0114000100000102000000490000000781a56d6f64656cd9406162616261626162616261626162616261626162616261"
        "62616261626162616261626162616261626162616261626162616261626162616261626162616261627061796c6f6164"
    ),
    "Demand": (
        "0115000100000102000000230000000783a66c617965727392003ca7657870657274739203ccffa6686f75726c7992cd"
        "1c205a7061796c6f6164"
    ),
    "GetChunkList": (
        "0120000100000102000000480000000781a468617368d940616261626162616261626162616261626162616261626162"
        "616261626162616261626162616261626162616261626162616261626162616261626162616261627061796c6f6164"
    ),
    "ChunkHashes": "01210001000001020000000b0000000781a473697a65ce001000007061796c6f6164",
    "GetChunks": (
        "0122000100000102000000580000000783a468617368d940616261626162616261626162616261626162616261626162"
        "61626162616261626162616261626162616261626162616261626162616261626162616261626162a56669727374cd01"
        "2ca5636f756e74207061796c6f6164"
    ),
    "Chunk": "01230001000001020000000a0000000781a5696e646578cd012c7061796c6f6164",
    "GetHave": (
        "0124000100000102000000480000000781a468617368d940616261626162616261626162616261626162616261626162"
        "616261626162616261626162616261626162616261626162616261626162616261626162616261627061796c6f6164"
    ),
    "Have": "0125000100000102000000150000000782a473697a65ce00300000a8636f6d706c657465c27061796c6f6164",
    "OpenBulk": "01260001000001020000000100000007807061796c6f6164",
    "BulkOffer": (
        "01270001000001020000008b0000000784a961646472657373657391b62f6970342f31302e302e302e312f7463702f34"
        "303032ab66696e6765727072696e74c4206465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182"
        "83a5746f6b656ec4200000000000000000000000000000000000000000000000000000000000000000a86c6966657469"
        "6d65cb403e0000000000007061796c6f6164"
    ),
    "RunExperts": (
        "0130000100000102000000ae000000078aa56d6f64656cd9406162616261626162616261626162616261626162616261"
        "6261626162616261626162616261626162616261626162616261626162616261626162616261626162a56c6179657207"
        "a6746f6b656e7302a668696464656e04a56474797065a442463136ad776569676874735f6474797065a3463332a4666f"
        "726da373756da7657870657274739201cc82a6636f756e7473920201a8646561646c696e65cb40000000000000007061"
        "796c6f6164"
    ),
    "ExpertsDone": (
        "0131000100000102000000230000000782a6776169746564cb0000000000000000a8636f6d7075746564cb3fe0000000"
        "0000007061796c6f6164"
    ),
}
PROOFS = {
    "/moehive/peer/1.0.0": "b769123937c8aee72c37057a95dab5c88d3b20e5ea7e30c009f72d76f00e1a77",
    "/moehive/shard/1.0.0": "66713f198aeb70d5a25363ded9d51c7eea8dd411bb433a721370632da5e52648",
    "/moehive/expert/1.0.0": "4742723dc25010a01d1faf3b68467e4df5528645bb62ac330acdb3ac0ea7c740",
}
INVENTORY_RECORD = (
    "01e640e715f0ebfebe8755f96b04431e4268cdf8e18de04726001d2c91a8ea0a73ee6ad2f61caad76d666ef056f92b9840c3"
    "19e9be6b077e7451e54bdaa891008ea17602a5737761726dc41000000000000000000000000000000000a470656572d93431"
    "3244334b6f6f574b3939566f56784e4537587a79427758457a573778684b37477076383572394633563366794b53554b5048"
    "35a56d6f64656cd9406162616261626162616261626162616261626162616261626162616261626162616261626162616261"
    "6261626162616261626162616261626162616261626162a6697373756564cb41dad27480000000a765787069726573cb41da"
    "d27496800000a961646472657373657391b62f6970342f31302e302e302e312f7463702f34303031a8736b656c65746f6ec3"
    "a8636f6d706c657465c3a76c6f6164696e67c3a66c6179657273920002a76578706572747305a66269746d6170c4022102af"
    "726f77735f7065725f7365636f6e64cb408f400000000000"
)
DIRECTORY_KEY = "22e7e380118724cfbde2aa6579a984360ee024bcb94cfca1484cd6e2275ec408"
TICKET_TEXT = (
    "moehive1otq2ncuduf3adjttmvrxezluyqqaaaicamcakbqhbaequcymbuha6earcijrifiwc4mbsgq3dqor4h5fobswk4tt"
    "shmu6l3joa2c6mjqfyyc4mbogexxiy3qf42dambrf5yde4bpgezeim2ln5xvoszzhflg6vtyjzctowd2pfbhowcfpjlto6di"
    "jm3uo4dwha2xeokggnldgztzjnjvks2qja2q"
)
MANIFEST_BYTES = (
    "7b226368756e6b53697a65223a313034383537362c2264656661756c745765696768744c61796f7574223a22726f7722"
    "2c22666f726d6174223a226d6f6568697665222c2268617368416c676f726974686d223a22626c616b65332d6368756e"
    "6b6564222c226d6f64656c223a7b22617263686974656374757265223a225177656e334d6f65466f7243617573616c4c"
    "4d222c226474797065223a2242463136222c2265787065727446666e223a7b2261637469766174696f6e223a2273696c"
    "75222c22616c706861223a312e3730322c2262696173223a66616c73652c2267617465223a22636c616d7065642d696e"
    "7465726c6561766564222c226c696d6974223a372e302c227472616e73706f736564223a66616c73657d2c2268696464"
    "656e53697a65223a342c22696e7465726d65646961746553697a65223a322c226d6f64656c54797065223a227177656e"
    "335f6d6f65222c226d6f654c6179657273223a5b315d2c226d74704c6179657273223a5b5d2c226e616d65223a227469"
    "6e79205c7530306539222c226e756d45787065727473223a312c227175616e74697a6174696f6e223a7b22626c6f636b"
    "223a5b3132382c3132385d2c226d6574686f64223a226670382d626c6f636b227d2c22746f704b223a317d2c22736861"
    "7264696e675374726174656779223a22657870657274222c22736861726473223a5b7b2266696c65223a2264656e7365"
    "2f302e7361666574656e736f7273222c2268617368223a22616261626162616261626162616261626162616261626162"
    "61626162616261626162616261626162616261626162616261626162616261626162616261626162222c2273697a6522"
    "3a36342c2274797065223a2264656e7365227d2c7b226578706572744b6579223a22315f30222c2266696c65223a2265"
    "7870657274732f315f302e7361666574656e736f7273222c2268617368223a2261626162616261626162616261626162"
    "616261626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162"
    "222c2273697a65223a33322c2274797065223a22657870657274227d5d2c2274656e736f7273223a7b22612e77656967"
    "6874223a7b226474797065223a22463332222c226c61796f7574223a22726f77222c226f6666736574223a33322c2273"
    "68617065223a5b325d2c227368617264223a302c2273697a65223a387d2c22622e776569676874223a7b226474797065"
    "223a2242463136222c226c61796f7574223a22726f77222c226f6666736574223a31362c227368617065223a5b322c34"
    "5d2c227368617264223a312c2273697a65223a31367d7d2c2276657273696f6e223a317d"
)
MODEL_ID = "71ed726ab47eeb3e4e68ecf1b435bd68ea59cd74b7cf4f2889970f159e9c5351"


def frame_of(message: Message) -> bytes:
    """As a session sends it: request 258, two payload buffers, the MORE flag."""
    session = ServerSession(PEER, Admission(secret=SECRET, local=peer(1), remote=peer(2)), "agent")
    return b"".join(session._frame(258, message, (b"pay", bytearray(b"load")), more=True))


def test_every_kind_has_a_sample() -> None:
    assert [type(message) for message in SAMPLES] == list(ALL_MESSAGES)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_frames(message: Message) -> None:
    frozen = bytes.fromhex(FRAMES[type(message).__name__])
    assert frame_of(message) == frozen
    (frame,) = FrameDecoder().feed(frozen)
    assert (frame.kind, frame.request_id, frame.flags, bytes(frame.payload)) == (message.KIND, 258, 1, b"payload")
    assert decode(type(message), frame.meta) == message


def test_proofs() -> None:
    admission = Admission(secret=SECRET, local=peer(1), remote=peer(2))
    assert {spec.name: admission.own_proof(spec.name).hex() for spec in (PEER, SHARD, EXPERT)} == PROOFS
    assert b"".join(ClientSession(PEER, admission, "agent").send_hello()).endswith(bytes.fromhex(PROOFS[PEER.name]))


def test_inventory() -> None:
    frozen = bytes.fromhex(INVENTORY_RECORD)
    assert encode_inventory(INVENTORY, private_key(1).sign) == frozen
    assert decode_inventory(frozen, now=INVENTORY.issued) == INVENTORY


def test_directory_key() -> None:
    assert directory_key(SECRET, ModelId(MODEL), 3).hex() == DIRECTORY_KEY


def test_ticket() -> None:
    assert str(TICKET) == TICKET_TEXT
    assert Ticket.parse(TICKET_TEXT) == TICKET


def test_manifest() -> None:
    assert MANIFEST.to_bytes().hex() == MANIFEST_BYTES
    assert Manifest.from_bytes(bytes.fromhex(MANIFEST_BYTES)) == MANIFEST
    assert MANIFEST.model_id == MODEL_ID
