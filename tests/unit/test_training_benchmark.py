"""What benchmarks/training.py reckons; nothing is trained here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from benchmarks import training
from benchmarks.training import Point, Result, Task
from training_jobs.fit import Epoch

TASK = Task(folder="", model="mobilenet_v2", images=960, epochs=2, size=64)


def result(name: str, *accuracies: float, seed: int = 0, rate: float | None = None) -> Result:
    curve = [Point(10.0 * number, 15.0 * number, accuracy) for number, accuracy in enumerate(accuracies, 1)]
    return Result(
        name=name, seed=seed, rate=rate, device="cpu", threads=2, images_per_second=100.0 + seed, cpu_seconds_per_image=0.01,
        waiting=None if name == "limit" else 0.25, curve=curve,
    )  # fmt: skip


def test_the_references_best_rate_of_the_first_seed_is_kept_for_the_others() -> None:
    made: list[tuple[str, int, float]] = []

    def each(run: Callable[[Task], Result], task: Task) -> Result:
        made.append((run.__name__, task.seed, task.rate))
        end = {0.01: 0.5, 0.03: 0.8, 0.1: 0.7}[task.rate] - task.seed / 10  # a later seed that does worse changes nothing
        return result(run.__name__, *([] if run is training.limit else [0.2, end]), seed=task.seed, rate=task.rate)

    runs, grid = training.compare(TASK, 3, each)
    assert [(seed, rate) for name, seed, rate in made if name == "reference"] == [
        (0, 0.01), (0, 0.03), (0, 0.1), (1, 0.03), (2, 0.03),
    ]  # fmt: skip
    assert [seed for name, seed, _ in made if name == "ours"] == [0, 1, 2]
    assert [run.rate for run in grid] == [0.01, 0.03, 0.1]
    assert [(run.name, run.seed) for run in runs] == [
        ("limit", 0), ("ours", 0), ("reference", 0), ("ours", 1), ("reference", 1), ("ours", 2), ("reference", 2),
    ]  # fmt: skip
    assert {run.rate for run in runs if run.name == "reference"} == {0.03}


def test_ours_is_trained_longer_with_each_seed_where_that_is_asked_for() -> None:
    made: list[tuple[str, int, int]] = []

    def each(run: Callable[[Task], Result], task: Task) -> Result:
        made.append((task.title if run is training.ours else run.__name__, task.seed, task.epochs))
        return result(run.__name__, 0.5, seed=task.seed, rate=task.rate)

    training.compare(TASK, 2, each, longer=6)
    assert made[:3] == [("limit", 0, 2), ("ours", 0, 2), ("ours, 6 epochs", 0, 6)]
    assert made[6:] == [("ours", 1, 2), ("ours, 6 epochs", 1, 6), ("reference", 1, 2)]


def test_what_is_trained_is_told_beside_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    training.say_epoch("reference", msgspec.structs.replace(TASK, seed=1, rate=0.03), 2, 61.4, 0.925)
    told = capsys.readouterr()
    assert told.err == "reference, seed 1, learning rate 0.03: epoch 2 of 2, 61 s, 92.5% of the held-out images right\n"
    assert told.out == ""


def test_what_was_not_measured_is_no_zero() -> None:
    epoch = Epoch(number=3, of=4, loss=0.1, validation=0.0, learning_rate=0.1, seconds=1.0, images=1, waited=0.0)
    assert training.held_out(epoch) == 0
    with pytest.raises(ValueError, match="nothing was measured after epoch 3"):
        training.held_out(replace(epoch, validation=None))


def test_the_first_epoch_that_is_accurate_enough_counts() -> None:
    run = result("ours", 0.5, 0.76, 0.7, 0.8)
    assert training.reached(run, 0.75) == Point(20.0, 30.0, 0.76)
    assert training.reached(run, 0.81) is None


def test_runs_of_a_name_are_a_row_which_says_where_the_goal_was_missed() -> None:
    runs = [
        result("limit"),
        result("ours", 0.8, 0.9),
        result("ours", 0.7, 0.8, seed=2),
        result("reference", 0.5),
        result("reference", 0.8),
    ]
    rows = training.table(runs, 0.75).splitlines()
    assert rows[2] == "| limit | 1 | 2 | 100 | 10.0 | – | – | – | – | – | 100% |"
    ours = "| ours | 2 | 2 | 101 (100–102) | 10.0 | 25.0% | 85.0% (80.0%–90.0%) | 20 | 15 (10–20) | 22 (15–30) | 101% |"
    assert rows[3] == ours
    assert rows[4].split(" | ")[6:10] == ["65.0% (50.0%–80.0%)", "10", "10, 1 of 2 runs", "15, 1 of 2 runs"]
    assert training.table(runs, 0.95).splitlines()[3].split(" | ")[8:10] == ["–", "–"]


def test_a_line_is_drawn_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[list[float]] = []
    real = Axes.plot

    def plot(axes: Axes, x: list[float], y: list[float], *rest: object, **named: object) -> object:
        drawn.append([*x, *y])
        return real(axes, x, y, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "plot", plot)
    file = tmp_path / "images/training.png"
    training.draw(
        [result("limit"), result("ours", 0.5, 0.75), msgspec.structs.replace(result("reference", 0.25), seed=1)], 0.75, file
    )
    assert drawn == [[10.0, 20.0, 50.0, 75.0], [10.0, 25.0]]
    assert file.read_bytes().startswith(b"\x89PNG")
