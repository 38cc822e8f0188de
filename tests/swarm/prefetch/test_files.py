from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from moehive.protocol.errors import TraceError
from moehive.swarm.prefetch.attending import HEADS, MIXED, SIZE, WIDTH, Asker, Reader
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
    shapes = ((HIDDEN, WIDTH), (WIDTH,), (WIDTH + HIDDEN, MIXED), (MIXED,))
    asker = Asker(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))
    shapes = ((HIDDEN, 2 * WIDTH), (HEADS, SIZE))
    reader = Reader(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))
    head = random.standard_normal((HIDDEN + MIXED, EXPERTS)).astype(np.float32)
    maps = {
        (Point.ENTRY, 3): LinearMap(wide, vector, vector + 1),
        (Point.BEFORE, 3): LinearMap(wide[:HIDDEN], vector),
        (Point.EARLIER, 3): LinearMap(head, vector, None, asker),
    }
    return Predictor(maps, 2, HIDDEN, {3: reader})


def test_a_predictor_comes_back_as_it_was(tmp_path: Path) -> None:
    write_predictor(predictor(), routers(), tmp_path / "it")
    found = read_predictor(tmp_path / "it", routers())
    assert (found.top_k, found.hidden_size) == (2, HIDDEN)
    assert set(found.maps) == set(predictor().maps)
    for place, expected in predictor().maps.items():
        assert (found.maps[place].weight == expected.weight).all()
        assert (found.maps[place].offset == expected.offset).all()
        assert (found.maps[place].correction is None) == (expected.correction is None)
        assert (found.maps[place].asker is None) == (expected.asker is None)
    asker, expected_asker = (it.maps[Point.EARLIER, 3].asker for it in (found, predictor()))
    for part in ("query", "query_offset", "mix", "mix_offset"):
        assert (getattr(asker, part) == getattr(expected_asker, part)).all()
    assert set(found.readers) == {3}
    assert (found.readers[3].weight == predictor().readers[3].weight).all()
    assert (found.readers[3].sink == predictor().readers[3].sink).all()


def test_another_models_predictor_is_refused(tmp_path: Path) -> None:
    write_predictor(predictor(), routers(), tmp_path / "it")
    with pytest.raises(TraceError, match="another model"):
        read_predictor(tmp_path / "it", routers(seed=5))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"nothing of the kind")
    with pytest.raises(TraceError):
        read_predictor(tmp_path / "it", routers())
    with pytest.raises(TraceError, match="cannot read"):
        read_predictor(tmp_path / "none", routers())


ARRAYS = {"entry.3.weight": np.zeros((HIDDEN, EXPERTS), np.float32), "entry.3.offset": np.zeros(EXPERTS, np.float32)}

SHAPES = {
    "entry.3.weight": (HIDDEN + MIXED, EXPERTS), "entry.3.offset": (EXPERTS,), "entry.3.query": (HIDDEN, WIDTH),
    "entry.3.queryOffset": (WIDTH,), "entry.3.mix": (WIDTH + HIDDEN, MIXED), "entry.3.mixOffset": (MIXED,),
    "reader.3.weight": (HIDDEN, 2 * WIDTH), "reader.3.sink": (HEADS, SIZE),
}  # fmt: skip
NETWORK = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
KNOWN = {"routers": fingerprint(routers()), "topK": 2, "hiddenSize": HIDDEN}


@pytest.mark.parametrize("arrays", [ARRAYS, NETWORK])
def test_what_is_changed_below_is_read(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    (tmp_path / "it").write_bytes(pack("moehive-predictor", "2", KNOWN, arrays))
    assert set(read_predictor(tmp_path / "it", routers()).maps) == {(Point.ENTRY, 3)}


def test_a_file_of_the_version_before_is_refused_and_what_helps_is_said(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(pack("moehive-predictor", "1", KNOWN, ARRAYS))
    with pytest.raises(TraceError, match=r"version '1'.*fit again with moehive trace fit"):
        read_predictor(tmp_path / "it", routers())


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
        ({}, NETWORK | {"entry.3.mix": np.zeros((WIDTH, MIXED), np.float32)}),
        ({}, NETWORK | {"entry.3.query": np.zeros((HIDDEN, WIDTH), np.float16)}),
        ({}, NETWORK | {"entry.3.weight": ARRAYS["entry.3.weight"]}),
        ({}, NETWORK | {"reader.3.sink": np.zeros((HEADS, SIZE + 1), np.float32)}),
        ({}, {name: array for name, array in NETWORK.items() if name != "entry.3.queryOffset"}),
        ({}, {name: array for name, array in NETWORK.items() if not name.startswith("reader")}),
    ],
)
def test_contents_that_cannot_be_are_refused(
    tmp_path: Path, facts: dict[str, object], arrays: dict[str, np.ndarray]
) -> None:
    (tmp_path / "it").write_bytes(pack("moehive-predictor", "2", KNOWN | facts, arrays))
    with pytest.raises(TraceError):
        read_predictor(tmp_path / "it", routers())
