"""Frames: any portions give the same frames, all else is a ProtocolViolation, nothing is allocated on credit."""

from __future__ import annotations

import contextlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wire import peak_bytes, portions, raw_frame

from moehive.protocol import limits
from moehive.protocol.errors import ProtocolViolation, RefusalCode, UnsupportedVersion
from moehive.protocol.frames import FLAG_MORE, HEADER, Frame, FrameDecoder, encode_header

frames = st.builds(
    Frame,
    kind=st.integers(0, 255),
    request_id=st.integers(0, (1 << 32) - 1),
    flags=st.sampled_from([0, FLAG_MORE]),
    meta=st.binary(max_size=40),
    payload=st.binary(max_size=60).map(bytearray),
)


def to_bytes(frame: Frame) -> bytes:
    header = encode_header(frame.kind, frame.request_id, frame.flags, len(frame.meta), len(frame.payload))
    return header + frame.meta + frame.payload


def feed_all(decoder: FrameDecoder, parts: list[bytes]) -> list[Frame]:
    return [frame for part in parts for frame in decoder.feed(part)]


@given(st.lists(frames, max_size=5), st.lists(st.integers(0, 500)))
def test_any_portions_give_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    decoder = FrameDecoder()
    assert feed_all(decoder, portions(b"".join(map(to_bytes, sent)), cuts)) == sent
    assert not decoder.mid_frame


@given(frames, st.data())
def test_every_proper_prefix_is_mid_frame(frame: Frame, data: st.DataObject) -> None:
    whole = to_bytes(frame)
    size = data.draw(st.integers(1, len(whole) - 1))
    decoder = FrameDecoder()
    assert list(decoder.feed(whole[:size])) == []
    assert decoder.mid_frame
    assert list(decoder.feed(whole[size:])) == [frame]
    assert not decoder.mid_frame


def test_byte_by_byte() -> None:
    sent = [Frame(3, 7, FLAG_MORE, b"meta", bytearray(b"payload")), Frame(4, 8, 0, b"", bytearray())]
    stream = b"".join(map(to_bytes, sent))
    assert feed_all(FrameDecoder(), [stream[i : i + 1] for i in range(len(stream))]) == sent


@given(st.lists(st.integers(1, 50_000), max_size=12), st.integers(0, 40))
def test_large_frames_are_put_together_from_portions_of_any_size(cuts: list[int], meta: int) -> None:
    sent = [Frame(3, 7, 0, bytes(meta), bytearray(Random(size).randbytes(size))) for size in (70_000, 0, 16_384)]
    decoder = FrameDecoder()
    assert feed_all(decoder, portions(b"".join(map(to_bytes, sent)), cuts)) == sent
    assert decoder.buffered == 0


def test_a_reused_receive_buffer_does_not_change_what_was_fed() -> None:
    whole = bytearray(to_bytes(Frame(1, 1, 0, b"abc", bytearray(b"defg"))))
    first, decoder = whole[:20], FrameDecoder()
    assert list(decoder.feed(first)) == []  # type: ignore[arg-type]
    first[:] = bytes(len(first))
    (frame,) = decoder.feed(bytes(whole[20:]))
    assert (frame.meta, bytes(frame.payload)) == (b"abc", b"defg")


def test_a_large_receive_buffer_may_be_reused_too() -> None:
    payload = bytearray(b"x" * 40_000)
    whole = bytearray(to_bytes(Frame(1, 1, 0, b"abc", payload)))
    first, decoder = whole[:30_000], FrameDecoder()
    assert list(decoder.feed(first)) == []  # type: ignore[arg-type]
    first[:] = bytes(len(first))
    (frame,) = decoder.feed(bytes(whole[30_000:]))
    assert frame.payload == payload


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_random_bytes_give_frames_or_a_violation(data: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(ProtocolViolation):
        feed_all(FrameDecoder(), portions(data, cuts))


@given(frames, st.integers(0, 15), st.integers(0, 255))
def test_a_perturbed_header_gives_frames_or_a_violation(frame: Frame, place: int, value: int) -> None:
    data = bytearray(to_bytes(frame))
    data[place] = value
    with contextlib.suppress(ProtocolViolation):
        list(FrameDecoder().feed(bytes(data)))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_other_versions_are_refused(version: int) -> None:
    with pytest.raises(UnsupportedVersion) as caught:
        list(FrameDecoder().feed(raw_frame(1, version=version)))
    assert caught.value.code is RefusalCode.UNSUPPORTED_VERSION


@pytest.mark.parametrize("flags", [2, 3, 1 << 15])
def test_unknown_flags_are_refused(flags: int) -> None:
    with pytest.raises(ProtocolViolation, match="flags"):
        list(FrameDecoder().feed(raw_frame(1, flags=flags)))


@pytest.mark.parametrize(
    ("meta", "payload"),
    [
        (limits.MAX_META_BYTES + 1, 0),
        (0, limits.MAX_PAYLOAD_BYTES + 1),
        (0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_declared_sizes_over_the_limit_are_refused_with_the_header(meta: int, payload: int) -> None:
    with pytest.raises(ProtocolViolation, match="over the limit"):
        list(FrameDecoder().feed(HEADER.pack(1, 1, 0, 1, meta, payload)))


def test_the_limits_themselves_are_allowed() -> None:
    assert list(FrameDecoder().feed(HEADER.pack(1, 1, 0, 1, limits.MAX_META_BYTES, limits.MAX_PAYLOAD_BYTES))) == []
    assert list(FrameDecoder(max_payload=4).feed(raw_frame(1, payload=b"1234")))
    with pytest.raises(ProtocolViolation):
        list(FrameDecoder(max_payload=3).feed(raw_frame(1, payload=b"1234")))


def test_a_declared_length_allocates_nothing() -> None:
    header = HEADER.pack(1, 1, 0, 1, limits.MAX_META_BYTES, limits.MAX_PAYLOAD_BYTES)
    decoder = FrameDecoder()
    assert peak_bytes(lambda: feed_all(decoder, [header, b"x" * 10])) < 10_000


def test_a_frame_in_single_bytes_costs_no_more_than_its_bytes() -> None:
    decoder = FrameDecoder()
    list(decoder.feed(HEADER.pack(1, 1, 0, 1, 0, limits.MAX_PAYLOAD_BYTES)))
    size = 20_000

    def trickle() -> None:
        for _ in range(size):
            for _ in decoder.feed(b"x"):
                raise AssertionError("not complete yet")

    assert peak_bytes(trickle) < 3 * size


def test_our_own_frames_over_the_limit_are_our_bug() -> None:
    with pytest.raises(AssertionError):
        encode_header(1, 1, 0, limits.MAX_META_BYTES + 1, 0)
    with pytest.raises(AssertionError):
        encode_header(1, 1, 0, 0, limits.MAX_PAYLOAD_BYTES + 1)
