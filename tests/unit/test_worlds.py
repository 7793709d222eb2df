"""Rank processes that fail in every way, and the routings and rows that tests run on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from crossdock import worlds
from crossdock.cases import ROUTING_CASES, choose, origin_rows, origin_rows_fp8
from crossdock.worlds import Pool, WorldError, spawn

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def pair():
    """Two ranks of this file's own, to be killed and replaced."""
    with Pool(2) as ranks:
        yield ranks


def sum_up(group, value):
    total = torch.full((2,), float(group.rank() + value))
    dist.all_reduce(total, group=group)
    return total, group.size(), torch.get_num_threads(), os.getpid()


def read_environment(group, name):
    return os.environ.get(name)


def raise_on(group, rank):
    if group.rank() == rank:
        raise LookupError("nothing there")
    return group.rank()


def fail_on(group, rank):
    if group.rank() == rank:
        pytest.fail("not what a test expected")


def sleep_on(group, rank):
    if group.rank() == rank:
        time.sleep(60)
    return group.rank()


def die_on(group, rank):
    if group.rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return group.rank()


def raise_while_others_wait(group):
    if group.rank() == 0:
        raise LookupError("nothing there")
    dist.barrier(group=group)


def leave_a_message(group):
    if group.rank() == 0:
        dist.isend(torch.zeros(1), 1, group=group)
    else:
        raise LookupError("did not listen")


def listen(group):
    message = torch.full((1,), 7.0)
    if group.rank() == 0:
        dist.send(message, 1, group=group)
    else:
        message.zero_()
        dist.recv(message, 0, group=group)
    return message.item()


def add_one(group, tensor):
    return tensor.add_(1)


def give_back(group, value):
    return value


def give_views(group):
    whole = torch.arange(12, dtype=torch.float32).view(3, 4)
    return {"column": whole[:, 1], "code": whole.to(torch.float8_e4m3fn), "none": whole[:0]}


def give_what_cannot_travel(group):
    return lambda: None


def describe_world(rank, num_ranks, word):
    return rank, num_ranks, dist.get_rank(), dist.get_world_size(), word


def test_spawn_gives_results_by_rank():
    results = spawn(describe_world, 2, "word")
    assert results == [(0, 2, 0, 2, "word"), (1, 2, 1, 2, "word")]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_a_job_runs_on_the_first_ranks(pool, num_ranks):
    results = pool.run(sum_up, 1, num_ranks=num_ranks)
    total = sum(range(1, num_ranks + 1))
    assert len(results) == num_ranks
    for tensor, size, num_threads, _ in results:
        assert tensor.tolist() == [total, total]
        assert (size, num_threads) == (num_ranks, 1)


def test_processes_are_kept(pool):
    first, second = (pool.run(sum_up, 0), pool.run(sum_up, 0))
    assert [each[-1] for each in first] == [each[-1] for each in second]


def test_a_raised_error_names_its_rank_and_leaves_the_pool_usable(pool):
    before = [each[-1] for each in pool.run(sum_up, 0)]
    with pytest.raises(WorldError, match="LookupError: nothing there") as caught:
        pool.run(raise_on, 2)
    assert list(caught.value.failures) == [2]
    assert "in raise_on" in caught.value.failures[2]
    assert caught.value.results == {0: 0, 1: 1, 3: 3}
    assert [each[-1] for each in pool.run(sum_up, 0)] == before


def test_failures_of_pytest_are_reported(pool):
    with pytest.raises(WorldError, match=r"rank 1(.|\n)*not what a test expected"):
        pool.run(fail_on, 1)


def test_no_message_survives_a_failed_job(pool):
    with pytest.raises(WorldError, match="did not listen"):
        pool.run(leave_a_message, num_ranks=2)
    assert pool.run(listen, num_ranks=2) == [7.0, 7.0]


def test_what_cannot_be_pickled_is_reported(pool):
    with pytest.raises(WorldError, match="give_what_cannot_travel"):
        pool.run(give_what_cannot_travel)
    assert pool.run(give_back, 5) == [5] * 4


def test_tensors_travel_by_value(pool):
    num_files = num_open_files()
    for _ in range(20):
        results = pool.run(give_views)
    assert num_open_files() == num_files
    for result in results:
        assert result["column"].tolist() == [1, 5, 9]
        assert result["code"].dtype == torch.float8_e4m3fn
        assert result["code"].float().flatten().tolist() == list(range(12))
        assert result["none"].shape == (0, 4)
        assert not any(tensor.is_shared() for tensor in result.values())


def num_open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_arguments_are_copies(pool):
    tensor = torch.zeros(3)
    assert [result.tolist() for result in pool.run(add_one, tensor)] == [[1, 1, 1]] * 4
    assert tensor.tolist() == [0, 0, 0]


def test_ranks_have_the_environment_of_when_they_start(monkeypatch):
    for value in ("first", "second", None):
        if value is None:
            monkeypatch.delenv("CROSSDOCK_A_TEST")
        else:
            monkeypatch.setenv("CROSSDOCK_A_TEST", value)
        with Pool(1) as ranks:
            assert ranks.run(read_environment, "CROSSDOCK_A_TEST") == [value]


def test_a_late_rank_is_named_with_where_it_stands(pair):
    pair.run(give_back, 0)
    started = time.monotonic()
    with pytest.raises(WorldError, match=r"rank 1: no answer after 1\.") as caught:
        pair.run(sleep_on, 1, timeout_s=1.0)
    assert time.monotonic() - started < 5
    assert list(caught.value.failures) == [1]
    assert "in sleep_on" in caught.value.failures[1]
    assert caught.value.results == {0: 0}
    assert pair.run(give_back, 3) == [3, 3]


def test_a_dead_rank_is_named_with_its_exit_code(pair):
    pair.run(give_back, 0)
    with pytest.raises(WorldError, match="ended with exit code -9") as caught:
        pair.run(die_on, 0, timeout_s=30)
    assert list(caught.value.failures) == [0]
    assert caught.value.results == {1: 1}
    assert pair.run(give_back, 3) == [3, 3]


def test_others_do_not_wait_long_for_a_rank_that_failed(pair, monkeypatch):
    monkeypatch.setattr(worlds, "_GRACE_S", 0.5)
    pair.run(give_back, 0)
    started = time.monotonic()
    with pytest.raises(WorldError, match="nothing there") as caught:
        pair.run(raise_while_others_wait, timeout_s=60)
    assert time.monotonic() - started < 10
    assert "in raise_while_others_wait" in caught.value.failures[1]


def test_closing_leaves_nothing_behind():
    ranks = Pool(2)
    (_, _, _, first), (_, _, _, second) = ranks.run(sum_up, 0)
    directory = ranks._world._directory
    assert directory.exists()
    ranks.close()
    ranks.close()
    assert not directory.exists()
    assert not is_running(first)
    assert not is_running(second)


PARENT = """
import sys
from crossdock.worlds import Pool
from tests.unit.test_worlds import sum_up

if __name__ == "__main__":
    pool = Pool(2)
    print(*[each[-1] for each in pool.run(sum_up, 0)], pool._world._directory, flush=True)
    sys.stdin.read()
"""


def test_ranks_end_with_the_process_that_made_them(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as parent:
        first, second, directory = parent.stdout.readline().split()
        assert is_running(int(first))
        assert is_running(int(second))
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while is_running(int(first)) or is_running(int(second)) or Path(directory).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_running(pid):
    """Whether a process is there and has not ended; one that only waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ROUTING_CASES)
def test_routings_are_well_formed(name, num_ranks):
    topk_idxs, num_experts = ROUTING_CASES[name].make(num_ranks, seed=3)
    assert len(topk_idxs) == num_ranks
    assert num_experts % num_ranks == 0
    for idx in topk_idxs:
        assert idx.dtype == torch.int64
        assert idx.is_contiguous()
        assert idx.shape[1] == topk_idxs[0].shape[1]
        assert ((idx >= -1) & (idx < num_experts)).all()


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_a_seed_decides_a_routing(name):
    case = ROUTING_CASES[name]
    one, same, other = case.make(3, seed=1), case.make(3, seed=1), case.make(3, seed=2)
    assert all(map(torch.equal, one.topk_idxs, same.topk_idxs))
    if name not in {"nobody", "all_to_one"}:
        assert not all(map(torch.equal, one.topk_idxs, other.topk_idxs))


def drawn(name, num_ranks=4):
    topk_idxs, num_experts = ROUTING_CASES[name].make(num_ranks)
    return topk_idxs, num_experts, torch.cat(topk_idxs)


def num_distinct(idx):
    return [len(set(choices) - {-1}) for choices in idx.tolist()]


def test_the_cases_are_what_they_say():
    assert {len(idx) for idx in drawn("uniform")[0]} == {16}
    assert len({len(idx) for idx in drawn("uneven")[0]}) == 4
    assert sorted(len(idx) == 0 for idx in drawn("one_rank_empty")[0]) == [False] * 3 + [True]
    assert len(drawn("nobody")[2]) == 0
    assert len(set(drawn("all_to_one")[2].flatten().tolist())) == 1
    slots = drawn("slots_empty")[2] < 0
    assert (slots.any(1) & ~slots.all(1)).any()
    tokens = drawn("tokens_empty")[2] < 0
    assert torch.equal(tokens.any(1), tokens.all(1))
    assert 0 < tokens.all(1).sum() < len(tokens)
    assert min(num_distinct(drawn("duplicates")[2])) < drawn("duplicates")[2].shape[1]
    _, num_experts, everything = drawn("all_experts")
    assert set(num_distinct(everything)) == {num_experts}
    assert drawn("one_choice")[2].shape[1] == 1


def test_chosen_experts_differ_and_spread():
    generator = torch.Generator().manual_seed(0)
    idx = choose(200, 16, 5, generator=generator)
    assert set(num_distinct(idx)) == {5}
    assert set(idx.flatten().tolist()) == set(range(16))


def test_rows_follow_the_formula_they_are_documented_with():
    row = origin_rows(5, 3, 7, dtype=torch.bfloat16)[2]
    assert row.tolist() == [3, 1, 6, -3, -1, -6, 6]


@pytest.mark.parametrize("hidden", [1, 7, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_exact(dtype, hidden):
    rows = origin_rows(127, 16384, hidden, dtype=dtype)
    assert rows.dtype == dtype
    assert torch.equal(rows.double(), origin_rows(127, 16384, hidden, dtype=torch.float64))
    assert (rows != 0).all()
    assert rows.isfinite().all()


def test_rows_name_their_origin():
    rows = torch.cat([origin_rows(rank, 300, 3, dtype=torch.bfloat16) for rank in range(4)])
    assert len(rows.unique(dim=0)) == 4 * 300


def test_columns_differ():
    rows = origin_rows(1, 1, 48, dtype=torch.float32)
    assert len(rows[0, ::3].unique()) == 16


@pytest.mark.parametrize("hidden", [1, 130, 512])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
def test_quantised_rows_name_their_origin(scale_dtype, hidden):
    data, scales = origin_rows_fp8(2, 300, hidden, scale_dtype=scale_dtype)
    assert data.dtype == torch.float8_e4m3fn
    assert data.shape == (300, hidden)
    assert not data.float().isnan().any()
    assert torch.equal(scales, origin_rows(2, 300, -(-hidden // 128), dtype=scale_dtype))
    if hidden > 2:
        everything = [
            origin_rows_fp8(rank, 300, hidden, scale_dtype=scale_dtype)[0] for rank in range(4)
        ]
        assert len(torch.cat(everything).view(torch.uint8).unique(dim=0)) == 4 * 300


def return_views(group: dist.ProcessGroup) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    storage = torch.arange(1 << 20, dtype=torch.int32)
    return storage[:2], {"bytes": storage.view(torch.uint8)[4:8].view(torch.float8_e4m3fn)}


def test_views_travel_without_their_storage(pool: Pool) -> None:
    ints, others = pool.run(return_views, num_ranks=1)[0]
    assert ints.tolist() == [0, 1]
    assert ints.untyped_storage().nbytes() == 8
    assert others["bytes"].view(torch.uint8).tolist() == [1, 0, 0, 0]
