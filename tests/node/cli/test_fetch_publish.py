"""`moehive fetch` and `moehive publish`: what is refused before a network is touched, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moehive.node.cli.fetch import FetchOptions, chosen_shards, describe_fetched, fetched_json
from moehive.node.cli.publish import PublishOptions, describe_published, settings_of
from moehive.node.settings import HttpSettings, NodeReady, Publishing
from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.manifest import Manifest
from moehive.protocol.ticket import Ticket
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.whole_model import FetchedModel

MODEL = "ab" * 32
TICKET = str(Ticket(b"s" * 32, ("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWLuwskeZqDnEvDMMiYRRJtEXF7JhrvV3zsNKxwRJr5sp4",)))


@pytest.fixture
def manifest(converted: Path) -> Manifest:
    return ConvertedDirectory(converted).manifest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fetch",), "MODEL_ID"),
        (("fetch", MODEL), "--join"),
        (("fetch", "demo", "--join", TICKET), "not a model id"),
        (("fetch", MODEL, "--join", "nonsense"), "ticket"),
        (("fetch", MODEL, "--join", TICKET, "--to", "x", "--pin"), "--pin"),
        (("fetch", MODEL, "--join", TICKET, "--seed", "/nowhere/at/all"), "no such directory"),
        (("fetch", MODEL, "--join", TICKET, "--seed", "hub:"), "hub:Qwen"),
        (("fetch", MODEL, "--join", TICKET, "--wait", "-1"), "--wait"),
        (("publish",), "DIRECTORY"),
        (("publish", "/nowhere/at/all"), "neither a converted directory"),
        (("publish", "/nowhere/at/all", "--copies", "0"), "--copies"),
        (("node", MODEL, "--join", TICKET, "--seed", "/nowhere/at/all"), "no such directory"),
    ],
)
def test_wrong_usage_is_explained_with_exit_code_2(moehive, arguments, said):
    outcome = moehive(*arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err


def test_which_shards(manifest: Manifest) -> None:
    assert chosen_shards(manifest, "all") == list(manifest.shards)
    assert chosen_shards(manifest, "none") == list(manifest.skeleton)
    some = chosen_shards(manifest, "0:0-1,2:3")
    keys = [shard.expert_key for shard in some if shard.expert_key is not None]
    assert keys == [ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(2, 3)]
    assert set(manifest.skeleton) <= set(some)
    for spec in ("auto", "99:0", "x"):
        with pytest.raises(ConfigError, match="--experts"):
            chosen_shards(manifest, spec)


def test_what_was_fetched(manifest: Manifest) -> None:
    shards = tuple(chosen_shards(manifest, "0:0-1"))
    fetched = FetchedModel(manifest, shards, found=1000, seconds=2.0)
    text = describe_fetched(fetched, FetchOptions(join=TICKET, to=Path("/somewhere")))
    assert "demo: 2 of 48 experts and the dense part are in /somewhere" in text
    assert "1000 B were here before" in text
    assert "moehive node /somewhere" in text
    assert "in the store" in describe_fetched(fetched, FetchOptions(join=TICKET))
    answer = fetched_json(fetched, FetchOptions(join=TICKET))
    assert answer["bytesFetched"] == answer["bytes"] - 1000
    assert json.loads(json.dumps(answer)) == answer


def test_publishing_is_a_node_that_computes_nothing(converted: Path, home: Path) -> None:
    settings = settings_of(converted, PublishOptions(copies=2, upload_slots=3), Publishing(2))
    assert (settings.experts, settings.upload_slots, settings.publish) == ("none", 3, Publishing(2))
    assert settings.identity == home / "data" / "identity.key"
    assert settings.http == HttpSettings()
    assert settings_of(converted, PublishOptions(http="off"), Publishing()).http is None


def test_what_a_publisher_says() -> None:
    ready = NodeReady(
        peer=PeerId("12D3"), model=ModelId(MODEL), model_name="demo", held=0, experts=48, held_bytes=0,
        supplied_bytes=5 << 20, skeleton=True, addresses=("/ip4/127.0.0.1/tcp/1",), ticket=Ticket.parse(TICKET),
        http="http://127.0.0.1:12345",
    )  # fmt: skip
    text = describe_published(ready)
    assert f"moehive fetch {MODEL} --join TICKET" in text
    assert f"ticket: {TICKET}" in text
    assert "5.0 MiB, every byte verified" in text
    assert "dashboard  http://127.0.0.1:12345" in text
