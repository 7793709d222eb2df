"""The exception tree: drawn, public, and with facts as attributes."""

from __future__ import annotations

import pickle
import re

import pytest

import crossdock
from crossdock import errors

_DRAWN = re.findall(r"(\w+Error)\s*(?:\(([\w]+)\))?", errors.__doc__ or "")


def test_the_drawing_is_the_tree() -> None:
    drawn = {name for name, _ in _DRAWN}
    assert {name for name in errors.__all__ if name != "CrossdockError"} <= drawn
    for name, builtin in _DRAWN:
        if name in errors.__all__ and builtin:
            assert issubclass(getattr(errors, name), eval(builtin))


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_public(name: str) -> None:
    assert getattr(crossdock, name) is getattr(errors, name)
    assert issubclass(getattr(errors, name), errors.CrossdockError)


def test_a_timeout_names_who_what_and_how_long() -> None:
    error = errors.PeerTimeoutError(
        [3, 1],
        operation="combine",
        epoch=41,
        phase="land",
        waited_s=5.02,
        peers={1: "in dispatch 40 with 7 tokens", 3: "nothing yet"},
    )
    assert error.missing == [1, 3]
    for part in ("combine 41", "rank(s) 1, 3", "5.0 s", "land", "rank 1: in dispatch 40"):
        assert part in str(error)


def test_facts_are_attributes() -> None:
    small = errors.BufferTooSmallError(10, 5, argument="max_buffer_bytes", rank=2)
    assert (small.needed_bytes, small.have_bytes, small.argument, small.rank) == (
        10,
        5,
        "max_buffer_bytes",
        2,
    )
    assert "rank 2 needs 10 bytes" in str(small)
    mismatch = errors.RankMismatchError("hidden size", {0: 64, 1: 128}, where="call 3")
    assert mismatch.values == {0: 64, 1: 128}
    assert "rank 1: 128" in str(mismatch)
    missing = errors.MissingDependencyError("rich", extra="cli")
    assert missing.command == 'pip install "crossdock[cli]"'


def test_errors_survive_pickling_with_their_facts() -> None:
    timeout = errors.PeerTimeoutError(
        [2], operation="combine", epoch=4, phase="land", waited_s=1.0, peers={2: "nothing yet"}
    )
    examples = [
        timeout,
        errors.ShapeError("x", got=1, expected="2"),
        errors.UnsupportedError("this", {"a": "b"}),
        errors.RankMismatchError("hidden size", {0: 1, 1: 2}),
        errors.PeerRefusedError(1, operation="dispatch 3", reason="because"),
        errors.BufferTooSmallError(2, 1, argument="max_buffer_bytes", rank=0),
        errors.HandleError("stale"),
        errors.MissingDependencyError("rich", extra="cli"),
    ]
    for error in examples:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
