from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from moehive.protocol.errors import StorageError, TraceError
from moehive.swarm.prefetch.files import fingerprint, read_predictor, write_predictor
from moehive.swarm.prefetch.fitting import Router
from moehive.swarm.prefetch.history import PARTS
from moehive.swarm.prefetch.predictors import LinearMap, Point, Predictor
from moehive.swarm.trace.files import pack

EXPERTS, HIDDEN = 6, 4


def routers(seed: int = 0) -> Mapping[int, Router]:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
    return {3: Router(weight, np.zeros(EXPERTS, np.float32), np.ones(HIDDEN, np.float32))}


def predictor() -> Predictor:
    random = np.random.default_rng(1)
    wide = random.standard_normal(((1 + PARTS) * HIDDEN, EXPERTS)).astype(np.float32)
    vector = random.standard_normal(EXPERTS).astype(np.float32)
    maps = {(Point.ENTRY, 3): LinearMap(wide, vector, vector + 1), (Point.BEFORE, 3): LinearMap(wide[:HIDDEN], vector)}
    return Predictor(maps, 2, HIDDEN)


def test_a_predictor_comes_back_as_it_was(tmp_path: Path) -> None:
    write_predictor(predictor(), routers(), tmp_path / "it")
    found = read_predictor(tmp_path / "it", routers())
    assert (found.top_k, found.hidden_size) == (2, HIDDEN)
    assert set(found.maps) == set(predictor().maps)
    for place, expected in predictor().maps.items():
        assert (found.maps[place].weight == expected.weight).all()
        assert (found.maps[place].offset == expected.offset).all()
        assert (found.maps[place].correction is None) == (expected.correction is None)


def test_another_models_predictor_is_refused(tmp_path: Path) -> None:
    write_predictor(predictor(), routers(), tmp_path / "it")
    with pytest.raises(TraceError, match="another model"):
        read_predictor(tmp_path / "it", routers(seed=5))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"nothing of the kind")
    with pytest.raises(TraceError):
        read_predictor(tmp_path / "it", routers())
    with pytest.raises(StorageError):
        read_predictor(tmp_path / "none", routers())


ARRAYS = {"entry.3.weight": np.zeros((HIDDEN, EXPERTS), np.float32), "entry.3.offset": np.zeros(EXPERTS, np.float32)}


@pytest.mark.parametrize(
    ("facts", "arrays"),
    [
        ({"topK": EXPERTS + 1}, ARRAYS),
        ({"topK": "2"}, ARRAYS),
        ({"hiddenSize": HIDDEN + 1}, ARRAYS),
        ({}, ARRAYS | {"entry.3.offset": np.zeros(EXPERTS + 1, np.float32)}),
        ({}, ARRAYS | {"entry.3.weight": np.zeros((HIDDEN + 1, EXPERTS), np.float32)}),
        ({}, ARRAYS | {"entry.3.weight": np.zeros((HIDDEN, EXPERTS), np.float64)}),
        ({}, ARRAYS | {"entry.x.weight": np.zeros((HIDDEN, EXPERTS), np.float32)}),
        ({}, ARRAYS | {"never.3.weight": np.zeros((HIDDEN, EXPERTS), np.float32)}),
        ({}, {"entry.3.weight": ARRAYS["entry.3.weight"]}),
    ],
)
def test_contents_that_cannot_be_are_refused(
    tmp_path: Path, facts: dict[str, object], arrays: dict[str, np.ndarray]
) -> None:
    known = {"routers": fingerprint(routers()), "topK": 2, "hiddenSize": HIDDEN}
    (tmp_path / "it").write_bytes(pack("moehive-predictor", "1", known | facts, arrays))
    with pytest.raises(TraceError):
        read_predictor(tmp_path / "it", routers())
