"""Which objects no kept model needs: mark and sweep, a decision on facts without I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from moehive.protocol.errors import StorageError
from moehive.protocol.ids import ModelId, ShardHash


class MarkIncomplete(StorageError):
    """A model is to be kept whose objects are not known: nothing may be swept."""

    def __init__(self, model: ModelId) -> None:
        super().__init__(
            f"model {model} is to be kept, but its manifest is not in the store, so that nobody knows which objects "
            "belong to it; nothing was deleted. Fetch it again, or unpin it: moehive store unpin MODEL_ID"
        )
        self.model = model


def unmarked(
    objects: Iterable[ShardHash], keep: Iterable[ModelId], members: Mapping[ModelId, Collection[ShardHash]]
) -> frozenset[ShardHash]:
    """The objects that none of the models `keep` consists of. `members`: the objects of each model that is known.

    Raises MarkIncomplete where a model to keep is not known.
    """
    marked: set[ShardHash] = set()
    for model in keep:
        if model not in members:
            raise MarkIncomplete(model)
        marked.update(members[model])
    return frozenset(objects) - marked
