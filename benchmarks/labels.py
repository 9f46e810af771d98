"""Labels that an accuracy costs: the queue's strategies against random, on images whose truth is known.

    uv run python -m benchmarks.labels [--data digits textures faces] [--seeds 5] [--json FILE] [--plot FILE]

Every seed draws another holdout, which is never asked for, and another first batch, the same for all strategies. After each
batch the network is trained from nothing, as the loop does it, and the next batch is what Label Studio would hand out: of the
least solved cluster the lowest score. The curves of finished runs are kept in the file --cache, so that an interrupted
benchmark goes on where it was. A curve of 10 trainings takes one and a half minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks import note
from cli.examples.digits import scans
from labelloop import problem_types
from labelloop.active_learning import Place, place
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.records import ManifestRow, Region
from training_jobs import calibration, embeddings, network, problem
from training_jobs.dataset import Dataset, Examples, Pixels
from training_jobs.export import to_network
from training_jobs.fit import fit, make_repeatable

STRATEGIES = ("random", "uncertainty", "diverse")
_PATCH = 16  # pixels, width and height of a patch of a texture
_BAND = (20, 80)  # percentiles over the seeds


@dataclass(frozen=True)
class Images:
    """A data set: pixels uint8 `[N, height, width, 1]` with their classes, and how it is gone through.

    `epochs` of every training. `holdout`: share that is never asked for. `batch`: labels between two trainings. `goal`: so many
    random labels set the accuracy to reach. `most`: labels at which an active run ends.
    """

    classes: list[str]
    pixels: Pixels
    labels: list[str]
    epochs: int
    holdout: float
    batch: int
    goal: int
    most: int


class Point(msgspec.Struct, frozen=True):
    """A training: labels it was trained on, and the share of the holdout that it gets right."""

    labels: int
    accuracy: float


class Run(msgspec.Struct, frozen=True):
    """`control`: share of the queue that is asked for at random, whatever the strategy."""

    data: str
    strategy: str
    control: float
    seed: int


class Curve(msgspec.Struct, frozen=True):
    run: Run
    points: list[Point]


class Needed(msgspec.Struct, frozen=True):
    """Labels of a strategy until it is as accurate as random labels at the goal. None: not within its run.

    `by_seed`: the first size of each seed's own curve that reaches the same seed's random accuracy; chance helps, since it may
    be a single lucky training. `mean_curve`: the first size at which the mean over the seeds is as high as random's at the goal.
    """

    data: str
    strategy: str
    control: float
    by_seed: list[int | None]
    median: float | None
    mean_curve: int | None


@cache
def images(name: str) -> Images:
    return _DATA[name]()


def _digits() -> Images:
    """1,797 scanned digits of 8 × 8 pixels."""
    pixels = np.array([(scan * 255 / 16).round().astype(np.uint8) for scan, _ in scans()])[..., np.newaxis]
    labels = [label for _, label in scans()]
    return Images(sorted(set(labels)), pixels, labels, epochs=40, holdout=0.4, batch=50, goal=1000, most=450)


def _textures() -> Images:
    """Patches of scikit-image's photographs of brick, grass and gravel: 3,072, none overlapping another."""
    from skimage import data

    patches, labels = [], []
    for name in ("brick", "grass", "gravel"):
        photograph = getattr(data, name)()
        side = photograph.shape[0] // _PATCH
        cut = photograph[: side * _PATCH, : side * _PATCH].reshape(side, _PATCH, side, _PATCH).swapaxes(1, 2)
        patches.append(cut.reshape(-1, _PATCH, _PATCH))
        labels += [name] * (side * side)
    pixels = np.concatenate(patches)[..., np.newaxis]
    return Images(sorted(set(labels)), pixels, labels, epochs=10, holdout=0.3, batch=50, goal=1000, most=450)


def _faces() -> Images:
    """100 faces and 100 other details of photographs (Labeled Faces in the Wild), at half their 25 × 25 pixels."""
    from skimage.data import lfw_subset

    details = (255 * lfw_subset()).round().astype(np.uint8)  # type: ignore[no-untyped-call]
    pixels = np.array([np.asarray(Image.fromarray(detail).reduce(2)) for detail in details])[..., np.newaxis]
    labels = ["face"] * 100 + ["other"] * 100
    return Images(["face", "other"], pixels, labels, epochs=10, holdout=0.4, batch=10, goal=100, most=80)


_DATA: dict[str, Callable[[], Images]] = {"digits": _digits, "textures": _textures, "faces": _faces}


class Labelling:
    """One run: a queue, an annotator who knows the truth, and a network that is trained after every batch."""

    def __init__(self, run: Run, folder: ModelFolder) -> None:
        self._data, self._folder, self._run = images(run.data), folder, run
        hyperparameters = msgspec.structs.replace(folder.config.hyperparameters, epochs=self._data.epochs, seed=run.seed)
        queue = msgspec.structs.replace(folder.config.queue, strategy=run.strategy, control=run.control)
        splits = msgspec.structs.replace(folder.config.splits, test=0.0)  # the holdout is kept away from the queue altogether
        self._config = msgspec.structs.replace(folder.config, hyperparameters=hyperparameters, queue=queue, splits=splits)
        self._card = self._config.card("")
        order = np.random.default_rng(run.seed).permutation(len(self._data.labels)).tolist()
        held_out = round(self._data.holdout * len(order))
        self._holdout, self._waiting = order[:held_out], order[held_out:]
        self._solved = Counter[int | None]()

    def curve(self) -> list[Point]:
        data, labelled, points = self._data, list[int](), list[Point]()
        random = self._run.strategy == "random"
        self._take(data.batch, labelled, [Place(0.0, None)] * len(self._waiting))
        while True:
            trained = self._train(labelled)
            points.append(Point(len(labelled), self._accuracy(trained)))
            if len(labelled) >= (data.goal if random else data.most):
                return points
            count = data.batch if len(labelled) < data.most else data.goal - data.most
            self._take(count, labelled, self._places(trained, labelled))

    def _take(self, count: int, labelled: list[int], places: Sequence[Place]) -> None:
        """Label what is handed out next, so many of the waiting ones, one after another."""
        waiting = dict(zip(self._waiting, places, strict=True))
        for _ in range(count):
            chosen = min(waiting, key=lambda number: (self._solved[waiting[number].cluster], waiting[number].score))
            self._solved[waiting.pop(chosen).cluster] += 1
            labelled.append(chosen)
        self._waiting = list(waiting)

    def _train(self, labelled: list[int]) -> torch.nn.Module:
        make_repeatable(self._run.seed, exact=True)
        fresh, augment = network.build(self._folder, None)
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / "checkpoint.pt"
            data = Dataset(train=self._examples(labelled), validation=self._examples([]), test=self._examples([]))
            return fit(fresh, data, self._config, self._card, augment, checkpoint, lambda _: None)

    def _places(self, trained: torch.nn.Module, labelled: list[int]) -> list[Place]:
        """Where the project's own queue puts each waiting image."""
        kind = problem_types.of(self._config.problem_type)
        _, known = self._look(trained, labelled)
        found, seen = self._look(trained, self._waiting)
        held_out, _ = self._look(trained, self._holdout)
        card = msgspec.structs.replace(
            self._card,
            certainties=calibration.certainties(self._config.problem_type, held_out, self._card),
            centroids=embeddings.centroids(known, self._config.queue.clusters, self._run.seed),
        )
        groups = [hashlib.sha256(f"{self._run.seed}:{number}".encode()).hexdigest() for number in self._waiting]
        return [
            place(self._config, card, group, kind.certainty(candidates, card), np.asarray(embedding))
            for group, candidates, embedding in zip(groups, found, seen, strict=True)
        ]

    def _accuracy(self, trained: torch.nn.Module) -> float:
        found, _ = self._look(trained, self._holdout)
        kept = [problem.of(self._config.problem_type).kept(candidates, self._card) for candidates in found]
        rows = self._examples(self._holdout).rows
        return problem.of(self._config.problem_type).scores(rows, kept, self._config.classes, version=0).value

    def _look(
        self, trained: torch.nn.Module, numbers: list[int]
    ) -> tuple[list[list[Region]], np.ndarray[Any, np.dtype[np.float32]]]:
        """All that the network takes into consideration for each image, and the embeddings float32 `[N, D]`."""
        kind, heads = problem_types.of(self._config.problem_type), problem.of(self._config.problem_type).heads(trained)
        with torch.inference_mode():
            *outputs, embedding = heads.examine(to_network(torch.from_numpy(self._data.pixels[numbers])))
        return [kind.candidates([one.numpy()], self._card) for one in outputs[0]], embedding.numpy()

    def _examples(self, numbers: list[int]) -> Examples:
        rows = [
            ManifestRow(
                image="",
                sha256="",
                group="",
                regions=[Region(label=self._data.labels[number])],
                split="train",
                annotation="",
                task=0,
            )
            for number in numbers
        ]
        return Examples(rows, self._data.pixels[numbers])


def measure(run: Run) -> Curve:
    """One curve, by the digits' network and hyperparameters, whatever the images."""
    torch.set_num_threads(1)
    data, source = images(run.data), ModelConfigs.find()["digits"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "digits"
        folder.mkdir()
        config = yaml.safe_load((source.folder / "config.yaml").read_text())
        config["classes"] = data.classes
        config["image"] |= {"height": data.pixels.shape[1], "width": data.pixels.shape[2]}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "model.py").write_bytes((source.folder / "model.py").read_bytes())
        return Curve(run, Labelling(run, ModelFolder(folder)).curve())


def needed(curves: Sequence[Curve]) -> list[Needed]:
    """Labels of each strategy on each data set, as far as its seeds were run with random labels too."""
    by_run = {curve.run: curve.points for curve in curves}
    kinds = dict.fromkeys((run.data, run.strategy, run.control) for run in by_run)
    found = []
    for data, strategy, control in kinds:
        seeds = sorted(run.seed for run in by_run if (run.data, run.strategy, run.control) == (data, strategy, control))
        pairs = [
            (by_run[Run(data, strategy, control, seed)], by_run[Run(data, "random", 0.0, seed)][-1].accuracy)
            for seed in seeds
            if Run(data, "random", 0.0, seed) in by_run
        ]
        if not pairs:
            continue
        first = [_reached(points, goal) for points, goal in pairs]
        means = mean_curve([points for points, _ in pairs])
        goal = statistics.mean(goal for _, goal in pairs)
        found.append(Needed(data, strategy, control, first, _median(first), _reached(means, goal)))
    return found


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    return [Point(points[0].labels, statistics.mean(point.accuracy for point in points)) for points in zip(*curves, strict=True)]


def _median(sizes: Sequence[int | None]) -> float | None:
    """The median, in which a seed that never got there counts as the largest."""
    middle = statistics.median(float("inf") if size is None else size for size in sizes)
    return None if middle == float("inf") else middle


def _reached(points: Sequence[Point], goal: float) -> int | None:
    return next((point.labels for point in points if point.accuracy >= goal), None)


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Mean curves with a band over the seeds, a picture for each data set, as a PNG."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve.run.data for curve in curves))
    figure = Figure(figsize=(6 * len(names), 4.5), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        kinds = dict.fromkeys((curve.run.strategy, curve.run.control) for curve in curves if curve.run.data == name)
        for strategy, control in kinds:
            points = [c.points for c in curves if (c.run.data, c.run.strategy, c.run.control) == (name, strategy, control)]
            labels = [point.labels for point in points[0]]
            shares = 100 * np.array([[point.accuracy for point in one] for one in points])
            title = strategy + (f", {control:.0%} control" if control else "")
            (line,) = axes.plot(labels, shares.mean(axis=0), "o-", markersize=3, label=title)
            axes.fill_between(labels, *np.percentile(shares, _BAND, axis=0), alpha=0.15, color=line.get_color())
            if strategy == "random":
                axes.axhline(shares[:, -1].mean(), color=line.get_color(), linestyle=":", linewidth=1)
        axes.set(xlabel="labels to train on", ylabel="holdout accuracy, %", title=f"{name}, {len(points)} seeds")
        lowest = min(100 * c.points[1].accuracy for c in curves if c.run.data == name)
        axes.set_ylim(bottom=lowest - 1)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=_DATA, default=["digits", "faces"], help="(default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="(default: all)")
    parser.add_argument("--control", type=float, default=0.0, help="share of the active queues asked at random (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, of one core each (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path(".labelloop/labels.json"), help="finished runs (%(default)s)")
    parser.add_argument("--json", type=Path, help="write curves and figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    options = parser.parse_args()
    known = msgspec.json.decode(options.cache.read_bytes(), type=list[Curve]) if options.cache.is_file() else []
    wanted = [
        Run(data, strategy, 0.0 if strategy == "random" else options.control, seed)
        for data in options.data
        for seed in range(options.seeds)
        for strategy in options.strategies
    ]
    _run([run for run in wanted if run not in {curve.run for curve in known}], known, options)
    curves = [curve for curve in known if curve.run.data in options.data and curve.run.seed < options.seeds]
    figures = needed(curves)
    _print(figures, curves)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode({"needed": figures, "curves": curves})))
    if options.plot:
        draw(curves, options.plot)


def _run(missing: Sequence[Run], known: list[Curve], options: argparse.Namespace) -> None:
    """Add the missing runs to the known ones, and to the cache as they come."""
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for curve in pool.imap_unordered(measure, missing):
            known.append(curve)
            options.cache.write_bytes(msgspec.json.encode(known))
            note(f"{curve.run}: {curve.points[-1].accuracy:.1%} at {curve.points[-1].labels}")


def _print(figures: Sequence[Needed], curves: Sequence[Curve]) -> None:
    print("| images | strategy | control | seeds | labels for random's accuracy at the end: median | by seed | mean curve |")
    print("|---|---|---|---|---|---|---|")
    for row in figures:
        each = ", ".join(str(size or "–") for size in row.by_seed)
        median = "–" if row.median is None else f"{row.median:.0f}"
        seeds, mean = len(row.by_seed), row.mean_curve or "–"
        print(f"| {row.data} | {row.strategy} | {row.control:.0%} | {seeds} | {median} | {each} | {mean} |")
    for row in figures:
        points = mean_curve(
            [c.points for c in curves if (c.run.data, c.run.strategy, c.run.control) == (row.data, row.strategy, row.control)]
        )
        print(f"\n{row.data}, {row.strategy}, {row.control:.0%} control: mean accuracy by labels")
        print("  " + "  ".join(f"{point.labels}: {point.accuracy:.1%}" for point in points))


if __name__ == "__main__":
    main()
