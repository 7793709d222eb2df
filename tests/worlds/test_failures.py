"""Ranks that die, sleep or go astray: who is named, how soon, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock import Buffer, PeerTimeoutError, RankMismatchError, TransportError, worlds

DEADLINE_S = 2.0
NUM_RANKS = 4
CULPRIT = 2


def one_round(buffer: Buffer) -> None:
    topk_idx = torch.arange(NUM_RANKS).repeat(6, 1)
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_RANKS)
    x = torch.ones(6, 32)
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=topk_idx
    )
    combined, _, _ = buffer.combine(recv_x, handle)
    if not torch.equal(combined, NUM_RANKS * x):
        raise ValueError("wrong result")


def facts_of(error: TransportError, began: float) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "missing": getattr(error, "missing", None),
        "waited_s": time.monotonic() - began,
        "text": str(error),
    }


def fail_together(rank: int, num_ranks: int, transport: str, how: str) -> dict[str, Any] | None:
    """Three good rounds; then the culprit misbehaves and the others say what they learn."""
    buffer = Buffer(transport=transport, timeout_s=DEADLINE_S, first_call_timeout_s=30.0)
    for _ in range(3):
        one_round(buffer)
    if rank == CULPRIT and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == CULPRIT and how == "sleep":
        time.sleep(3 * DEADLINE_S)
    began = time.monotonic()
    try:
        one_round(buffer)
    except TransportError as error:
        return facts_of(error, began)
    return None


@pytest.mark.parametrize("how", ["kill", "sleep"])
@pytest.mark.parametrize("transport", ["one_sided", "collective"])
def test_every_other_rank_names_the_missing_one_in_time(transport: str, how: str) -> None:
    before = set(os.listdir("/dev/shm"))
    try:
        results = dict(
            enumerate(worlds.spawn(fail_together, NUM_RANKS, transport, how, timeout_s=60))
        )
    except worlds.WorldError as error:
        assert how == "kill"
        assert set(error.failures) == {CULPRIT}
        results = error.results
    others = {rank: told for rank, told in results.items() if rank != CULPRIT}
    assert set(others) == {0, 1, 3}
    for told in others.values():
        assert told["kind"] == "PeerTimeoutError", told
        assert told["missing"] == [CULPRIT]
        assert told["waited_s"] <= DEADLINE_S + 1
        assert "dispatch 7" in told["text"]
        assert f"rank {CULPRIT}: in combine 6" in told["text"]
    if (transport, how) == ("one_sided", "sleep"):
        assert results[CULPRIT]["kind"] == "TransportError"
        assert "gave up" in results[CULPRIT]["text"]
        assert results[CULPRIT]["waited_s"] < 1
    assert set(os.listdir("/dev/shm")) <= before


def fail_alone(rank: int, num_ranks: int) -> dict[str, Any] | None:
    """The culprit is interrupted in the middle of a call; the others need not wait for it."""
    buffer = Buffer(transport="one_sided", timeout_s=30.0, first_call_timeout_s=30.0)
    one_round(buffer)
    if rank == CULPRIT:
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    if rank == 0:
        time.sleep(1.5)
    began = time.monotonic()
    try:
        one_round(buffer)
    except TransportError as error:
        return facts_of(error, began)
    except KeyboardInterrupt:
        return {"kind": "KeyboardInterrupt"}
    return None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_rank_tells_the_others_at_once() -> None:
    results = worlds.spawn(fail_alone, NUM_RANKS, timeout_s=60)
    assert results[CULPRIT] == {"kind": "KeyboardInterrupt"}
    for rank in (0, 1, 3):
        assert results[rank]["kind"] == "TransportError"
        assert f"rank {CULPRIT} gave up" in results[rank]["text"]
        assert "KeyboardInterrupt" in results[rank]["text"]
        assert results[rank]["waited_s"] < 2


def go_astray(group: dist.ProcessGroup, transport: str) -> list[str]:
    """One rank leaves out a combine; everyone learns who is in which operation."""
    buffer = Buffer(group, transport=transport, timeout_s=20.0, first_call_timeout_s=20.0)
    one_round(buffer)
    topk_idx = torch.zeros(2, 1, dtype=torch.int64)
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_RANKS)
    arguments = {
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": topk_idx,
    }
    recv_x, _, _, _, handle, _ = buffer.dispatch(torch.ones(2, 8), **arguments)
    try:
        if buffer.rank == CULPRIT:
            buffer.dispatch(torch.ones(2, 8), **arguments)
        else:
            buffer.combine(recv_x, handle)
    except RankMismatchError as error:
        one_round(buffer)
        return [error.field, *(str(error.values[rank]) for rank in range(buffer.group_size))]
    return []


@pytest.mark.parametrize("transport", ["one_sided", "collective"])
def test_a_rank_in_another_operation_is_named(pool: worlds.Pool, transport: str) -> None:
    wanted = ["operation", "combine", "combine", "dispatch", "combine"]
    assert pool.run(go_astray, transport) == [wanted] * NUM_RANKS


SCRIPT = """
import os, signal, time
from crossdock import Buffer, worlds

def work(rank, num_ranks):
    buffer = Buffer(transport="one_sided")
    buffer.warmup(1024, 8192)
    os.write(1, f"ready {os.getpid()}\\n".encode())
    time.sleep(60)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    worlds.spawn(work, 2)
"""


def shared_memory_bytes() -> int:
    """What the whole host holds in memory files and /dev/shm."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_a_world_is_ended(tmp_path: Path, sign: signal.Signals) -> None:
    files, held = set(os.listdir("/dev/shm")), shared_memory_bytes()
    script = tmp_path / "world.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as world:
        pids = [int(world.stdout.readline().split()[1]) for _ in range(2)]
        assert shared_memory_bytes() - held > 200 << 20
        world.send_signal(sign)
        world.communicate(timeout=30)
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert shared_memory_bytes() - held < 50 << 20
    assert set(os.listdir("/dev/shm")) <= files


def test_the_error_is_a_timeout_error() -> None:
    assert issubclass(PeerTimeoutError, TimeoutError)
