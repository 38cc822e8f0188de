"""Who holds what: announcements of others, and this node's own holdings, whatever its announcement says."""

from __future__ import annotations

from dataclasses import replace

from support.node_facts import MODEL, PEER, coverage, inventory
from support.swarm_fakes import identity

from moehive.node.coverage import MOST_PEERS
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.swarm.directory import Holders

OTHER = identity(2).peer


def test_counts_of_each_layer() -> None:
    assert coverage().to_json() == {
        "modelId": MODEL,
        "layers": [
            {"layer": 0, "holders": [1, 1, 0, 0], "own": [0]},
            {"layer": 1, "holders": [2, 0, 0, 0], "own": [0]},
        ],
    }
    assert coverage().by_copies(1) == [5, 3]
    assert coverage().by_copies(3) == [5, 2, 1, 0]


def test_what_was_announced_and_is_gone_does_not_count() -> None:
    lost = replace(coverage(), own=frozenset())
    assert [layer["holders"][0] for layer in lost.to_json()["layers"]] == [0, 1]


def test_an_expert_that_the_model_does_not_have_is_passed_over() -> None:
    found = replace(coverage(), holders=Holders({OTHER: inventory(OTHER, [(0, 1), (7, 7)])}))
    assert [len(layer["holders"]) for layer in found.to_json()["layers"]] == [4, 4]
    assert [(peer["peer"], peer["experts"]) for peer in found.peers_json()["peers"]] == [(PEER, 2), (OTHER, 1)]


def test_this_node_is_the_first_of_the_peers_and_not_all_are_told() -> None:
    known = {PeerId(f"peer{number:04}"): [] for number in range(MOST_PEERS + 9)} | {PEER: [(0, 0)]}
    found = replace(coverage(), holders=Holders({peer: inventory(peer, keys) for peer, keys in known.items()}))
    said = found.peers_json()
    assert (said["known"], len(said["peers"])) == (MOST_PEERS + 10, MOST_PEERS)
    assert said["peers"][0] == {
        "peer": PEER,
        "self": True,
        "experts": 2,
        "skeleton": False,
        "complete": False,
        "loading": False,
    }


def test_this_node_is_told_before_its_announcement_has_come_back() -> None:
    alone = replace(coverage(), holders=Holders({}), own=frozenset([ExpertKey(0, 0), ExpertKey(1, 1)])).peers_json()
    assert alone["known"] == 1
    assert [(peer["peer"], peer["self"], peer["experts"]) for peer in alone["peers"]] == [(PEER, True, 2)]
