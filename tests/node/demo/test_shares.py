"""Who holds what in the demonstration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.node.demo.shares import share_experts, spec_of
from moehive.protocol.errors import ConfigError


@given(st.integers(1, 64).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))))
def test_shares(case):
    experts, nodes = case
    shares = share_experts(experts, nodes)

    assert len(shares) == nodes
    assert set().union(*shares) == set(range(experts))
    assert all(len(set(share)) == len(share) for share in shares)
    owners = [sum(expert in share for share in shares) for expert in range(experts)]
    assert max(owners) <= 2
    assert sum(owners) == experts + (nodes if nodes > 1 else 0)  # one expert of every node is held twice


def test_more_nodes_than_experts_are_refused():
    with pytest.raises(ConfigError, match="at most 8"):
        share_experts(8, 9)


def test_the_option_for_a_share():
    assert spec_of((0, 1, 7)) == "*:0,*:1,*:7"
