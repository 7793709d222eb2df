"""`crossdock demo`: trains a small mixture of experts on this machine, and checks itself.

Starts the ranks, shows what rank 0 tells while they train, and has the last word on whether the
expert-parallel model and its dense copy agree. What the ranks do is in `demo_training.py`, the
model in `demo_model.py`, the picture in `demo_picture.py`.
"""

from __future__ import annotations

import json
import statistics
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from crossdock.cli.demo_model import Settings
from crossdock.cli.demo_picture import Story, draw
from crossdock.cli.demo_training import Job, Outcome, Step, train
from crossdock.worlds import spawn

__all__ = ["BOUND", "demo", "run_job", "verdict"]

BOUND = 1e-5
"""Largest difference that passes the self-check.

World and dense copy add the same float32 terms in another order. A rounding is 6e-8 of a term, the
longest sums run over some hundred tokens, and roundings mostly cancel.
"""

_TEXT_BYTES = 2_000_000
_MIN_TEXT_BYTES = 16_384
_LOOK_EVERY_S = 0.1


def demo(
    *,
    ranks: Annotated[int, typer.Option(min=1, help="Processes to spread experts over.")] = 4,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer, on all ranks.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts that each token visits.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 250,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="What to learn from.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to put the picture.")] = Path(
        "crossdock-demo.png"
    ),
) -> None:
    """Train a mixture-of-experts language model on several processes of this machine.

    It learns bytes: of Python's own library, or of a text of yours. Afterwards it compares loss and
    gradients with a dense copy in one process; the exit code is 1 if they differ.
    """
    if experts % ranks:
        raise typer.BadParameter(f"--experts {experts} is not a multiple of --ranks {ranks}")
    if top_k > experts:
        raise typer.BadParameter(f"--top-k {top_k} is more than --experts {experts}")
    data = _standard_library() if text is None else text.read_bytes()
    if not output.parent.is_dir():
        raise typer.BadParameter(f"--output: there is no directory {output.parent}")
    if len(data) < _MIN_TEXT_BYTES:
        raise typer.BadParameter(f"--text has {len(data)} bytes, fewer than {_MIN_TEXT_BYTES}")
    console = Console(highlight=False)
    source = "Python's standard library" if text is None else text.name
    console.print(
        f"{len(data) / 1e3:,.0f} kB of {source}; ranks: {ranks}, experts: {experts}, top-k: {top_k}"
    )
    settings = Settings(num_experts=experts, top_k=top_k)
    told, outcomes = run_job(settings, data, num_ranks=ranks, num_steps=steps, console=console)
    held_out_loss = outcomes[0].held_out_loss
    draw(Story(told, ranks, top_k, data, held_out_loss), output)
    passed, line = verdict(outcomes)
    console.print(_summary(told, held_out_loss), soft_wrap=True)
    console.print(line, style="green" if passed else "bold red", soft_wrap=True)
    console.print(f"picture: {output.resolve()}", soft_wrap=True)
    raise typer.Exit(0 if passed else 1)


def run_job(
    settings: Settings, text: bytes, *, num_ranks: int, num_steps: int, console: Console
) -> tuple[list[Step], list[Outcome]]:
    """Train on fresh processes, with a progress bar; returns rank 0's steps, every rank's outcome.

    Raises:
        WorldError: a rank failed, or took longer than a minute and five seconds a step.
    """
    with tempfile.TemporaryDirectory(prefix="crossdock-demo-") as directory:
        path = Path(directory) / "steps"
        path.touch()
        job = Job(settings, num_steps, text, path)
        with _watched(path, num_steps, console) as told:
            outcomes = spawn(train, num_ranks, job, timeout_s=60.0 + 5.0 * num_steps)
    return told, outcomes


def verdict(outcomes: list[Outcome]) -> tuple[bool, str]:
    """Whether all ranks' self-checks are within the bound, and the line that says so."""
    checks = [outcome.self_check for outcome in outcomes]
    passed = all(check.difference <= BOUND for check in checks)
    worst = max(checks, key=lambda check: (not check.difference <= BOUND, check.difference))
    return passed, (
        f"self-check {'passed' if passed else 'FAILED'}: loss and {worst.num_gradients} gradients "
        f"of the model on {len(checks)} rank(s) against a dense copy in one process: largest "
        f"relative difference {worst.difference:.1e} (in {worst.where}), bound {BOUND:.0e}"
    )


def _standard_library() -> bytes:
    """Python's own modules, in order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= _TEXT_BYTES:
            break
    return bytes(text[:_TEXT_BYTES])


@contextmanager
def _watched(path: Path, num_steps: int, console: Console) -> Iterator[list[Step]]:
    """Show the steps that are written to `path` meanwhile; the list holds them afterwards."""
    told: list[Step] = []
    done = threading.Event()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting ranks", total=num_steps, said="")

        def watch() -> None:
            for step in _steps(path, done):
                told.append(step)
                said = f"loss {step.loss:.3f}  {_speed(told):,.0f} tokens/s"
                progress.update(task, description="training", completed=step.number, said=said)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield told
        finally:
            done.set()
            watcher.join()


def _steps(path: Path, done: threading.Event) -> Iterator[Step]:
    """Each step as its line appears, until `done` is set and all lines are read."""
    with path.open(encoding="utf-8") as file:
        line = ""
        last_look = False
        while not last_look:
            last_look = done.wait(_LOOK_EVERY_S)
            for piece in file:
                line += piece
                if line.endswith("\n"):
                    yield Step(*json.loads(line))
                    line = ""


def _speed(told: list[Step]) -> float:
    return statistics.median(step.tokens_per_s for step in told[-20:])


def _summary(told: list[Step], held_out_loss: float) -> str:
    return (
        f"loss {told[0].loss:.3f} -> {told[-1].loss:.3f} nats a byte in {len(told)} steps, "
        f"{held_out_loss:.3f} on text never seen; median {_speed(told):,.0f} tokens/s"
    )
