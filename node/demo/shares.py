"""Which experts each node of the demonstration holds. Pure."""

from __future__ import annotations

from itertools import pairwise

from moehive.protocol.errors import ConfigError


def share_experts(experts: int, nodes: int) -> list[tuple[int, ...]]:
    """Expert numbers of each node, the same in every layer: equal shares, and one more that the next node has too.

    All experts are held, none by every node where there are three or more. Raises ConfigError for more nodes than
    experts.
    """
    if nodes > experts:
        raise ConfigError(
            f"--nodes {nodes}: the demo model has {experts} experts in a layer, so at most {experts} nodes"
        )
    starts = [node * experts // nodes for node in range(nodes + 1)]
    shares = []
    for first, following in pairwise(starts):
        own = range(first, following)
        overlap = {following % experts} - set(own)
        shares.append((*own, *sorted(overlap)))
    return shares


def spec_of(share: tuple[int, ...]) -> str:
    """The `--experts` option for a share."""
    return ",".join(f"*:{expert}" for expert in share)
