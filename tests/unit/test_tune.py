"""`crossdock tune`: what it tries, what it chooses, and what `Config.load` makes of its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from crossdock import Config, ConfigError, CrossdockError
from crossdock.cli.tune import Trial, candidates, chosen


def test_candidates_leave_some_to_receive_and_begin_with_what_is_usual():
    found = candidates(24)
    assert found[0] == Config(24)
    assert len(set(found)) == len(found) == 13
    assert {each.num_send_sms for each in found[1:]} == {6, 8, 12, 16}
    assert all(0 < each.num_send_sms < 2 for each in candidates(2)[1:])


def test_the_fastest_trial_is_chosen_among_those_that_worked():
    slow, fast = Config(24), Config(24, num_send_sms=8)
    trials = [
        Trial(operation="dispatch", config=slow, time_us=3.0),
        Trial(operation="dispatch", config=fast, time_us=2.0),
        Trial(operation="dispatch", config=Config(2), why="wrong result: rows"),
        Trial(operation="combine", config=Config(2), time_us=1.0),
        Trial(operation="layout", config=Config(2), why="too late"),
    ]
    assert chosen(trials, "dispatch").config == fast
    with pytest.raises(CrossdockError, match="no layout could be measured: too late"):
        chosen(trials, "layout")


def test_what_is_found_is_loaded_again(tmp_path):
    import typer

    from crossdock.cli.tune import tune

    path, app = tmp_path / "tuned.json", typer.Typer()
    app.command()(tune)
    sizes = ["--tokens=3", "--hidden=128", "--experts=4", "--top-k=2", "--sms=2", "--iters=1"]
    given = ["--device=rehearsal", "--ranks=2", f"--out={path}", *sizes]
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads(path.read_text())
    assert document["shape"]["tokens"] == 3
    assert document["machine"]["date"]
    for operation in ("dispatch", "combine"):
        best = Config.load(path, operation)
        mine = [each for each in document["measured"] if each["operation"] == operation]
        assert len(mine) == len(candidates(2))
        times = {json.dumps(each["config"]): each["time_us"] for each in mine}
        assert times[json.dumps(vars(best))] == min(times.values())


@pytest.mark.parametrize(
    "text", ["", "{}", '{"best": {"combine": {}}}', '{"best": {"dispatch": {"speed": 1}}}']
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no knobs for 'dispatch'"):
        Config.load(path, "dispatch")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no knobs"):
        Config.load(tmp_path / "nothing", "dispatch")


@pytest.mark.parametrize(
    "knobs", [{"num_send_sms": -1}, {"tile_bytes": -8}, {"num_sms": 8, "num_send_sms": 8}]
)
def test_knobs_that_do_not_go_together_are_refused(knobs: dict[str, int]):
    with pytest.raises(ConfigError, match=r"num_send_sms|tile_bytes"):
        Config(**knobs)
