"""Worlds of real processes on this machine.

Tests, the demo and the benchmark need ranks as processes whose failures are told apart. What the
ranks compute is the caller's business: this file knows no Buffer. What they may compute with is in
`cases`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import _env

if TYPE_CHECKING:  # one of them is not everywhere
    from multiprocessing.context import ForkServerContext, SpawnContext

__all__ = ["Pool", "WorldError", "spawn"]

Job: TypeAlias = Callable[..., Any]
_Answer: TypeAlias = tuple[Any, str]  # what a rank returned, and why it did not

_START_S = 180.0  # for the ranks of a new world: each imports torch, on a machine that may be small
_GRACE_S = 10.0  # for the others, once one rank has failed


class WorldError(RuntimeError):
    """A job did not return on every rank.

    Attributes:
        failures: rank -> why: its traceback, its exit code, or where it stood at the deadline.
        results: rank -> what it returned, for the ranks that did return.
    """

    def __init__(self, failures: Mapping[int, str], results: Mapping[int, Any]) -> None:
        super().__init__("\n".join(f"rank {rank}: {why}" for rank, why in failures.items()))
        self.failures = dict(failures)
        self.results = dict(results)


def spawn(fn: Job, num_ranks: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `fn(rank, num_ranks, *args)` on fresh processes and return the results by rank.

    In each process the default process group is a gloo group of all ranks, torch has one thread,
    and Ctrl-C is left to the caller's process. `fn`, `args` and results are pickled (tensors come
    back on the CPU), so `fn` must be importable and a script needs `if __name__ == "__main__":`.

    Args:
        fn: What each rank runs.
        num_ranks: How many processes.
        *args: What `fn` gets besides.
        timeout_s: What the job may take, start of the processes not counted.

    Raises:
        WorldError: A rank raised, died, or had not returned in time.
    """
    with Pool(num_ranks) as pool:
        return pool.run(_call_with_rank, fn, num_ranks, *args, timeout_s=timeout_s)


class Pool(contextlib.AbstractContextManager["Pool"]):
    """Rank processes that are kept between jobs, since starting them costs seconds.

    They start with the first job, and are replaced after a job in which one died or did not answer
    in time. They end with `close()`, and when the process that made the pool ends, however it ends.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._world: _World | None = None
        self._num_failed = 0

    def run(
        self, fn: Job, *args: Any, num_ranks: int | None = None, timeout_s: float = 60.0
    ) -> list[Any]:
        """Run `fn(group, *args)` on the first `num_ranks` ranks; return the results by rank.

        `group` is a gloo process group of exactly those ranks, the same one in every job until a
        job fails; then the next gets a new one, since messages may be left in the old.

        Args:
            fn: What each rank runs; importable, as for `spawn`.
            *args: What `fn` gets besides.
            num_ranks: How many ranks take part, at most the pool's; None = all.
            timeout_s: What the job may take; once a rank has failed, ten more seconds at most.

        Raises:
            WorldError: A rank raised, died, or had not returned in time.
        """
        size = self.num_ranks if num_ranks is None else num_ranks
        self._world = world = self._world or _World(self.num_ranks)
        try:
            job = _dumps((size, self._num_failed, fn, args))
            results, failures = world.ask(job, timeout_s)
        finally:
            if not world.is_whole:
                self.close()
        if failures:
            self._num_failed += 1
            raise WorldError(failures, results)
        return [results[rank] for rank in range(size)]

    def close(self) -> None:
        """End the processes. May be called again; a later `run` starts new ones."""
        if self._world is not None:
            self._world.stop()
            self._world = None

    def __exit__(self, *_: object) -> None:
        self.close()


class _World:
    """One life of the rank processes, seen from the process that asks them."""

    def __init__(self, num_ranks: int) -> None:
        self.is_whole = False
        self._directory = Path(tempfile.mkdtemp(prefix="crossdock-world-"))
        self._forget = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._ranks = [_start(rank, num_ranks, self._directory) for rank in range(num_ranks)]
        _, failures = self._settle(_START_S)
        if failures:
            self.stop()
            raise WorldError(failures, {})

    def ask(self, job: bytes, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Give every rank the job; return what they returned and why others did not."""
        self.is_whole = False
        for _, link in self._ranks:
            with contextlib.suppress(OSError):
                link.send_bytes(job)
        return self._settle(timeout_s)

    def stop(self) -> None:
        """Let idle processes end by themselves, and kill those that are at work or stuck."""
        for process, link in self._ranks:
            link.close()
            if not self.is_whole:
                process.kill()
        for process, _ in self._ranks:
            process.join(5.0)
            process.kill()
            process.join()
            process.close()
        self._forget()

    def _settle(self, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        started = time.monotonic()
        answers = self._collect(timeout_s)
        late = [rank for rank in range(len(self._ranks)) if rank not in answers]
        self.is_whole = not late and all(process.is_alive() for process, _ in self._ranks)
        results = {rank: value for rank, (value, why) in answers.items() if not why}
        failures = {rank: why for rank, (_, why) in answers.items() if why}
        for rank, stack in self._stacks(late).items():
            failures[rank] = (
                f"no answer after {time.monotonic() - started:.1f} s; it stands at\n{stack}"
            )
        return results, dict(sorted(failures.items()))

    def _collect(self, timeout_s: float) -> dict[int, _Answer]:
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(self._ranks):
            late = {link: i for i, (_, link) in enumerate(self._ranks) if i not in answers}
            ready = wait(list(late), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            answers.update((late[link], self._read(late[link])) for link in late if link in ready)
            if any(why for _, why in answers.values()):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        return answers

    def _read(self, rank: int) -> _Answer:
        process, link = self._ranks[rank]
        try:
            answer: _Answer = _loads(link.recv_bytes())
        except (EOFError, OSError):
            process.join(1.0)
            return None, f"its process ended with exit code {process.exitcode}"
        return answer

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Say where the given ranks stand, by asking their fault handlers."""
        for rank in ranks:
            pid = self._ranks[rank][0].pid
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3 if ranks else 0.0)
        return {rank: (self._directory / f"stack-{rank}").read_text() for rank in ranks}


def _start(rank: int, num_ranks: int, directory: Path) -> tuple[BaseProcess, Connection]:
    context = _context()
    ours, theirs = context.Pipe()
    arguments = {"num_ranks": num_ranks, "directory": directory, "link": theirs}
    given = (rank, _env.snapshot())
    process = context.Process(target=_serve, args=given, kwargs=arguments, daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _context() -> SpawnContext | ForkServerContext:
    """How processes start: forked from one that has imported torch, which takes each seconds.

    Those that use GPUs, or the libraries of macOS, had better not be forked.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _serve(
    rank: int,
    environment: dict[str, str],
    *,
    num_ranks: int,
    directory: Path,
    link: Connection,
) -> None:
    """What a rank process does: takes jobs until nobody is there to give any."""
    _env.take_over(environment)
    with (directory / f"stack-{rank}").open("w") as stack:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        faulthandler.register(signal.SIGUSR1, file=stack)
        threading.Thread(target=_end_with_parent, args=(directory,), daemon=True).start()
        meeting = f"file://{directory / 'store'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
        link.send_bytes(_dumps((None, "")))
        groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        with contextlib.suppress(EOFError, OSError):  # nobody gives jobs any more
            while True:
                link.send_bytes(_answer(link.recv_bytes(), groups))
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # taking torch down in good order costs a second of processor time


def _end_with_parent(directory: Path) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)


def _answer(job: bytes, groups: dict[tuple[int, int], dist.ProcessGroup]) -> bytes:
    try:
        return _dumps((_perform(job, groups), ""))
    except BaseException:  # noqa: BLE001 - the caller sees it
        return _dumps((None, traceback.format_exc()))


def _perform(job: bytes, groups: dict[tuple[int, int], dist.ProcessGroup]) -> Any:
    """Run a job here; making a group takes every rank of the world, so all get every job."""
    num_ranks, num_failed, fn, args = _loads(job)
    key = (num_ranks, num_failed)
    if key not in groups:
        groups[key] = dist.new_group(list(range(num_ranks)), backend="gloo")
    return fn(groups[key], *args) if dist.get_rank() < num_ranks else None


def _call_with_rank(group: dist.ProcessGroup, fn: Job, num_ranks: int, *args: Any) -> Any:
    return fn(group.rank(), num_ranks, *args)


def _dumps(value: Any) -> bytes:
    """Pickle without shared memory: tensors travel as bytes and belong to who reads them."""
    data = io.BytesIO()
    torch.save(_owned(value), data)
    return data.getvalue()


def _loads(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _owned(value: Any) -> Any:
    """The same with tensors cloned: a view would bring its whole storage."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _owned(item) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    items = [_owned(item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
