"""Server-sent events pass whole, and no byte is lost, added or moved."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightvllm.router.events import WholeEvents

ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


@given(st.data())
def test_bytes_are_kept_and_cuts_fall_between_events(data):
    end = data.draw(st.sampled_from(ENDS))
    texts = data.draw(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\r", b"").replace(b"\n", b""))))
    stream = b"".join(b"data: " + text + end for text in texts) + data.draw(st.sampled_from([b"", b"data: rest"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    events, passed = WholeEvents(), b""
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        passed += events.feed(stream[start:stop])
        assert stream.startswith(passed)
        assert not passed or passed.endswith(ENDS)
        assert events.between
    assert passed + events.finish() == stream


def test_an_endless_event_is_not_kept_for_ever():
    events = WholeEvents()
    passed = b"".join(events.feed(b"x" * 1000) for _ in range(1000))
    assert len(passed) > 700_000
    assert not events.between
    assert events.feed(b"y\n\n").endswith(b"y\n\n")
    assert events.between
