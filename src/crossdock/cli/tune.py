"""`crossdock tune`: which knobs are best for tokens of a shape on this machine.

Tries how many of the SMs of a high-throughput call send while the others place or add up, and how
much one of them moves at a time, on cached dispatches and on combines, and writes down the best of
each with all that was measured. `Config.load` reads the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.console import Console

from crossdock import Buffer, Config, CrossdockError, worlds
from crossdock.cli.bench import machine_facts
from crossdock.cli.bench_device import device_facts, device_setup
from crossdock.cli.bench_device_cases import HIGH_THROUGHPUT, Chapter, Setup
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_device_throughput import ThroughputCalls, sum_problem

__all__ = ["Trial", "candidates", "chosen", "measure_trials", "tune"]

_OPERATIONS = ("dispatch", "combine")
_PARTS = ((1, 4), (1, 3), (1, 2), (2, 3))
"""Of the SMs, that send."""
_TILES = (16 << 10, 32 << 10, 64 << 10)
_FORMS = ("bf16", "fp8")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A call with some knobs: its time in microseconds, or why there is none."""

    operation: str
    config: Config
    time_us: float | None = None
    why: str = ""


def tune(
    *,
    out: Annotated[Path, typer.Option(help="Where to write what was found.")] = Path(
        "crossdock-tuned.json"
    ),
    device: Annotated[str, typer.Option(help="cuda; rehearsal: to try it out on the CPU.")] = (
        "cuda"
    ),
    ranks: Annotated[int | None, typer.Option(help="Ranks (default: all GPUs).")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a rank.")] = 4096,
    hidden: Annotated[int, typer.Option(help="Width of a token.")] = 7168,
    form: Annotated[str, typer.Option("--format", help="Of dispatched tokens: bf16 or fp8.")] = (
        "bf16"
    ),
    top_k: Annotated[int, typer.Option(help="Experts a token chooses.")] = 8,
    experts: Annotated[int, typer.Option(help="Experts of the world.")] = 256,
    sms: Annotated[int, typer.Option(help="SMs that a call may use.")] = 24,
    iters: Annotated[int, typer.Option(help="Timed calls with each choice of knobs.")] = 30,
    budget_s: Annotated[
        float, typer.Option("--budget-s", help="Seconds after which nothing is begun.")
    ] = 120.0,
) -> None:
    """Find the best knobs of high-throughput calls for this machine, and write them to a file."""
    console = Console()
    try:
        if form not in _FORMS:
            raise typer.BadParameter(f"--format is {form!r}, must be one of {', '.join(_FORMS)}")
        setup = device_setup(
            device,
            ranks,
            hidden=hidden,
            num_topk=top_k,
            num_experts=experts,
            num_iters=iters,
            budget_s=budget_s,
        )
        chapter = Chapter(
            setup=setup,
            system="crossdock",
            mode=HIGH_THROUGHPUT,
            num_tokens=tokens,
            forms=(form,),
            sms=(sms,),
        )
        with worlds.Pool(setup.num_ranks) as pool:
            trials = pool.run(measure_trials, chapter, timeout_s=budget_s + 60.0)[0]
        best = {operation: chosen(trials, operation) for operation in _OPERATIONS}
    except (CrossdockError, worlds.WorldError) as error:
        console.print(f"refused: {error}", highlight=False, markup=False, style="red")
        raise typer.Exit(1) from error
    out.write_text(_document(chapter, trials, best), encoding="utf-8")
    for operation, trial in best.items():
        knobs = f"{trial.config.num_send_sms} of {sms} SMs send, {trial.config.tile_bytes} bytes"
        console.print(f"{operation}: {trial.time_us:.0f} us, {knobs} at a time", highlight=False)
    console.print(f"written to {out}", highlight=False)


def candidates(num_sms: int) -> list[Config]:
    """The knobs to try, those that are taken without a choice first."""
    senders = sorted({max(num_sms * num // of, 1) for num, of in _PARTS})
    tried = [
        Config(num_sms, num_send_sms=num, tile_bytes=tile)
        for num in senders
        if num < num_sms
        for tile in _TILES
    ]
    return [Config(num_sms), *tried]


def chosen(trials: Sequence[Trial], operation: str) -> Trial:
    """The fastest trial of an operation.

    Raises:
        CrossdockError: none worked.
    """
    mine = [trial for trial in trials if trial.operation == operation]
    timed = [trial for trial in mine if trial.time_us is not None]
    if not timed:
        reasons = sorted({trial.why for trial in mine})
        raise CrossdockError(f"no {operation} could be measured: {'; '.join(reasons)}")
    return min(timed, key=lambda trial: trial.time_us or 0.0)


def measure_trials(group: dist.ProcessGroup, chapter: Chapter) -> list[Trial]:
    """Measures all candidates on this rank.

    **Collective**: every rank of the group. **Sync**: returns when all of it is done.

    Args:
        group: All ranks, by gloo.
        chapter: Tokens, form and SMs.
    """
    usual, num_sms = Buffer.num_sms, chapter.sms[0]
    Buffer.set_num_sms(num_sms)
    with Stage(group, chapter, remaining_s=chapter.setup.budget_s) as stage:
        try:
            with stage.buffer(max_tokens_per_rank=chapter.num_tokens) as buffer:
                calls = ThroughputCalls(stage, buffer, num_sms=num_sms)
                return [
                    _tried(calls, operation, config)
                    for config in candidates(num_sms)
                    for operation in _OPERATIONS
                ]
        finally:
            Buffer.set_num_sms(usual)


def _tried(calls: ThroughputCalls, operation: str, config: Config) -> Trial:
    stage, form = calls.stage, calls.stage.chapter.forms[0]
    calls.config = config
    call: Any = calls.combine
    if operation == "dispatch":
        call = partial(calls.dispatch_again, calls.encoded if form == "fp8" else calls.x)

    def problem(got: Any) -> str:
        if operation == "dispatch":
            return calls.rows_problem(got[0])
        return sum_problem(stage, got[0])

    blank = stage.blank(operation, form, "events", num_sms=config.num_sms)
    figure = stage.measure(blank, lambda: stage.clock.events(call, problem))
    return Trial(operation=operation, config=config, time_us=figure.time_us, why=figure.why)


def _document(chapter: Chapter, trials: Sequence[Trial], best: dict[str, Trial]) -> str:
    setup: Setup = chapter.setup
    told = {
        "machine": {**machine_facts(), **device_facts(setup)},
        "shape": {
            "ranks": setup.num_ranks,
            "tokens": chapter.num_tokens,
            "hidden": setup.hidden,
            "experts": setup.num_experts,
            "topk": setup.num_topk,
            "format": chapter.forms[0],
            "sms": chapter.sms[0],
        },
        "best": {operation: asdict(trial.config) for operation, trial in best.items()},
        "measured": [asdict(trial) for trial in trials],
    }
    return json.dumps(told, indent=2) + "\n"
