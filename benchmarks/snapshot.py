"""Dataset snapshots: what reading and freezing N annotated tasks costs, all of them and 1,000 new ones, against json.load.

    uv run python -m benchmarks.snapshot [--problem detection] [--tasks N …] [--new N] [--runs N] [--json FILE] [--plot FILE]

Synthetic tasks, as Label Studio 1.23 exports them: with the copy of the prediction that the annotator saw. They lie in a file, in
answers of 200 tasks, as the client asks for them; what Label Studio takes to make them (milliseconds a task) is left out, and so
is S3. Each measurement is a fresh process, in an order drawn at random; the median of the runs counts.

- `json.load`: the same tasks as one export, read and nothing more
- `full`: answers to index to manifest
- `new`: an index of N tasks is there; 1,000 more are read, and a manifest of all is written
- `alone`: a full snapshot of those 1,000 and no others
- `limit`: reads the bytes and looks at each
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import note
from labelloop.label_studio.client import LabelStudioClient, Tally, tasks_exported
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.model_config import ModelConfigs
from labelloop.snapshot_index import SnapshotIndex

PROBLEMS = {"classification": "digits", "detection": "digit_detector"}
KINDS = ("json.load", "full", "new", "alone", "limit")
ANSWER = 200  # tasks
TIME = "2026-01-01T00:00:00.000000Z"
BOXES = 4


def task(number: int, problem: str) -> dict[str, Any]:
    """A task as Label Studio exports it, with one annotation and the copy of the prediction that was seen."""
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    model = PROBLEMS[problem]
    result = choice(number) if problem == "classification" else boxes(number, sha256)
    prediction = {
        "id": number, "model_version": f"{model} v3", "score": 0.91, "result": result, "cluster": None, "neighbors": None,
        "mislabeling": 0.0, "created_ago": "2 hours", "created_at": TIME, "updated_at": TIME, "model": None, "model_run": None,
        "task": number, "project": 1,
    }  # fmt: skip
    annotation = {
        "id": number, "completed_by": 1, "result": result, "was_cancelled": False, "ground_truth": False, "created_at": TIME,
        "updated_at": TIME, "draft_created_at": None, "lead_time": 3.2, "prediction": prediction, "result_count": 1,
        "unique_id": f"{sha256[:8]}-{sha256[8:12]}-4{sha256[13:16]}-a{sha256[17:20]}-{sha256[20:32]}", "import_id": None,
        "last_action": None, "bulk_created": False, "task": number, "project": 1, "updated_by": 1, "parent_prediction": number,
        "parent_annotation": None, "last_created_by": None,
    }  # fmt: skip
    return {
        "id": number, "annotations": [annotation], "drafts": [], "predictions": [number],
        "data": {"image": f"s3://labelloop-prod-images/images/{model}/{sha256[:24]}.jpg"},
        "meta": {"sha256": sha256, "group": sha256, "width": 1280, "height": 960, "resembles": []},
        "created_at": TIME, "updated_at": TIME, "allow_skip": True, "inner_id": number, "total_annotations": 1,
        "cancelled_annotations": 0, "total_predictions": 1, "comment_count": 0, "unresolved_comment_count": 0,
        "last_comment_updated_at": None, "project": 1, "updated_by": 1, "comment_authors": [],
    }  # fmt: skip


def choice(number: int) -> list[dict[str, Any]]:
    return [{"from_name": "digit", "to_name": "image", "type": "choices", "value": {"choices": [str(number % 10)]}}]


def boxes(number: int, sha256: str) -> list[dict[str, Any]]:
    return [
        {
            "id": sha256[place * 10 : place * 10 + 10], "from_name": "box", "to_name": "image", "type": "rectanglelabels",
            "origin": "prediction", "original_width": 1280, "original_height": 960, "image_rotation": 0,
            "value": {"x": 10.25 * place, "y": 12.5, "width": 10.125, "height": 20.75, "rotation": 0,
                      "rectanglelabels": [str((number + place) % 10)]},
        }
        for place in range(BOXES)
    ]  # fmt: skip


def write(folder: Path, problem: str, count: int, new: int) -> None:
    """The export of `count` tasks, the same in answers, and the answers of `new` more."""
    with (folder / "export.json").open("wb") as export, (folder / "all").open("wb") as answers:
        export.write(b"[")
        for start in range(1, count + 1, ANSWER):
            body = json.dumps([task(number, problem) for number in range(start, min(start + ANSWER, count + 1))]).encode()
            export.write(body[1:-1] + (b", " if start + ANSWER <= count else b"]"))
            answers.write(len(body).to_bytes(4) + body)
    with (folder / "new").open("wb") as answers:
        for start in range(count + 1, count + new + 1, ANSWER):
            body = json.dumps([task(number, problem) for number in range(start, min(start + ANSWER, count + new + 1))]).encode()
            answers.write(len(body).to_bytes(4) + body)


class Answers(LabelStudioClient):
    """Label Studio's client, with a file of answers in place of a server."""

    def __init__(self, file: Path, count: int) -> None:
        self._file, self._tally = file, Tally(count, count, TIME)

    def tally(self, project: int) -> Tally:  # noqa: ARG002
        return self._tally

    def annotated_tasks(self, project: int, **_: Any) -> Iterator[list[AnnotatedTask]]:  # noqa: ARG002
        with self._file.open("rb") as answers:
            while size := answers.read(4):
                yield tasks_exported(answers.read(int.from_bytes(size)))


def measured(kind: str, folder: Path, problem: str, count: int, new: int) -> dict[str, float]:
    """In this process: seconds of wall and CPU, and MB of its memory at most."""
    model = ModelConfigs.find()[PROBLEMS[problem]]
    index = SnapshotIndex(model.config, model.label_config, 1, folder / "index" if kind == "new" else folder / "scratch")
    if kind in ("full", "alone"):
        index.clear()
    before, began, cpu = resident(), time.perf_counter(), time.process_time()
    match kind:
        case "json.load":
            with (folder / "export.json").open() as export:
                found = len(json.load(export))
        case "limit":
            found = 0
            with (folder / "export.json").open("rb") as export:
                while piece := export.read(2**20):
                    found += piece.count(b'"total_annotations"')
        case _:
            file, there = {"full": ("all", count), "new": ("new", count + new), "alone": ("new", new)}[kind]
            index.catch_up(Answers(folder / file, there), seconds=math.inf, log=lambda *_, **__: None)
            with (folder / "manifest").open("wb") as manifest:
                found = index.freeze(manifest, "").n_annotations
    figures = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu, "mb": resident(), "before_mb": before}
    index.close()
    expected = {"new": count + new, "alone": new}.get(kind, count)
    if abs(found - expected) > (count // 500 if kind == "limit" else 0):  # a piece may end within a word
        raise SystemExit(f"{kind} found {found} of {expected} tasks")
    return figures


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prepared_index(folder: Path, problem: str, count: int) -> None:
    model = ModelConfigs.find()[PROBLEMS[problem]]
    index = SnapshotIndex(model.config, model.label_config, 1, folder / "index")
    index.clear()
    index.catch_up(Answers(folder / "all", count), seconds=math.inf, log=lambda *_, **__: None)
    index.close()


def compare(problem: str, counts: Sequence[int], new: int, runs: int) -> list[dict[str, Any]]:
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            note(f"{count:,} tasks")
            write(folder, problem, count, new)
            prepared_index(folder, problem, count)
            size = (folder / "export.json").stat().st_size
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for _ in range(runs):
                for kind in random.sample(KINDS, len(KINDS)):
                    kept = shutil.copy2(folder / "index", folder / "kept")
                    words = [sys.executable, "-m", "benchmarks.snapshot", "--measure", kind, "--folder", name]
                    words += ["--problem", problem, "--tasks", str(count), "--new", str(new)]
                    done = subprocess.run(words, check=True, capture_output=True, text=True)
                    found[kind].append(json.loads(done.stdout))
                    shutil.move(kept, folder / "index")
                    (folder / "scratch").unlink(missing_ok=True)
            row: dict[str, Any] = {"tasks": count, "mb": size / 1e6, "index_mb": (folder / "index").stat().st_size / 1e6}
            for kind, all_of in found.items():
                row[kind] = {name: statistics.median(one[name] for one in all_of) for name in all_of[0]}
            rows.append(row)
    return rows


def exponent(rows: Sequence[dict[str, Any]], kind: str) -> float:
    """k of the least-squares fit of CPU seconds = c · tasks^k."""
    xs = [math.log(row["tasks"]) for row in rows]
    ys = [math.log(row[kind]["cpu_s"]) for row in rows]
    return statistics.linear_regression(xs, ys).slope


def plot(rows: Sequence[dict[str, Any]], problem: str, file: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    xs = [row["tasks"] for row in rows]
    for kind in ("json.load", "full", "new", "limit"):
        left.loglog(xs, [row[kind]["cpu_s"] for row in rows], "o-", label=kind)
        right.loglog(xs, [row[kind]["mb"] for row in rows], "o-", label=kind)
    left.set(xlabel="annotated tasks", ylabel="CPU, s", title=f"{problem}: growth of full: exponent {exponent(rows, 'full'):.2f}")
    right.set(xlabel="annotated tasks", ylabel="peak resident memory, MB")
    left.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, default="detection", help="what is annotated (default: %(default)s)")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="1000000 takes 2 GB of disk more")
    parser.add_argument("--new", type=int, default=1_000, help="tasks that came after the last snapshot (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="processes of each kind and size (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--plot", type=Path, help="draw the figures into this file")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure, options.folder, options.problem, options.tasks[0], options.new)))
        return
    rows = compare(options.problem, options.tasks, options.new, options.runs)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {options.problem}; median of {options.runs}")
    print("CPU s / wall s / peak MB")
    heads = ["tasks", "export MB", "index MB", *KINDS, "json.load ÷ full", "new ÷ alone"]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        cells = " | ".join(f"{row[kind]['cpu_s']:.2f} / {row[kind]['wall_s']:.2f} / {row[kind]['mb']:.0f}" for kind in KINDS)
        ratios = f"{row['json.load']['cpu_s'] / row['full']['cpu_s']:.1f} | {row['new']['cpu_s'] / row['alone']['cpu_s']:.1f}"
        print(f"| {row['tasks']:,} | {row['mb']:.0f} | {row['index_mb']:.0f} | {cells} | {ratios} |")
    if len(rows) > 1:
        growth = ", ".join(f"{kind} {exponent(rows, kind):.2f}" for kind in KINDS if kind != "alone")
        print(f"\ngrowth of CPU with the number of tasks, fitted exponent: {growth}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))
    if options.plot:
        plot(rows, options.problem, options.plot)


if __name__ == "__main__":
    main()
