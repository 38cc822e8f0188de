"""What no kept model consists of may be swept, and nothing where that is not known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import ModelId, ShardHash
from moehive.swarm.policy.garbage import MarkIncomplete, unmarked

HASHES = st.integers(0, 9).map(lambda number: ShardHash(f"{number:064x}"))
MODELS = st.integers(0, 3).map(lambda number: ModelId(f"{number:064x}"))


@given(st.sets(HASHES), st.dictionaries(MODELS, st.sets(HASHES)), st.data())
def test_objects_of_kept_models_stay_and_all_others_go(
    objects: set[ShardHash], members: dict[ModelId, set[ShardHash]], data: st.DataObject
) -> None:
    keep = data.draw(st.sets(st.sampled_from(sorted(members)))) if members else set()
    kept = set().union(*(members[model] for model in keep))
    assert unmarked(objects, keep, members) == objects - kept


def test_a_model_without_a_manifest_stops_it_all() -> None:
    with pytest.raises(MarkIncomplete, match="nothing was deleted"):
        unmarked([ShardHash("a" * 64)], [ModelId("b" * 64)], {})
