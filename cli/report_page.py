"""The page of `labelloop report`: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cli.cost import dollars, of_another_region
from cli.report import ChampionReport, Estimate, Measured, Report
from cli.status import Status, Version, how_far, moment, points
from cli.training_job import TRAINING
from labelloop.records import METRIC_TITLES, Interval, Verdict
from labelloop.wording import counted
from training_jobs.calibration import Bin
from training_jobs.drawing import BAD, BLUE, GOOD, INK, UNSURE, draw_confusion, render, svg
from training_jobs.evaluation_page import FIGURES

_MARKS: dict[Verdict, tuple[str, str]] = {
    "promote": ("o", GOOD),
    "keep": ("X", BAD),
    "undecided": ("s", UNSURE),
    "shadow": ("D", BLUE),
}


def write(report: Report, file: Path) -> None:
    """Write the page. Raises `OSError`."""
    file.write_text(html(report), encoding="utf-8")


def html(report: Report) -> str:
    status, champion = report.status, report.champion
    title = METRIC_TITLES[status.metric]
    return render(
        Path(__file__).with_name("report.html.jinja"),
        report=report,
        status=status,
        champion=champion,
        at=moment(report.at),
        title=title,
        figure=FIGURES[status.metric],
        tiles=list(_tiles(report)),
        problems=list(dict.fromkeys([*status.problems, *report.problems])),
        waiting=_waiting(status),
        learning_curve=_learning_curve(report) if any(row.metric for row in status.versions) else "",
        versions=[_row(row, its) for row, its in zip(status.versions, report.versions, strict=True)],
        confusion=_confusion(champion) if champion and champion.confusion else "",
        classes=[_class(its.name, its.images, its.value) for its in champion.classes] if champion else [],
        reliability=_reliability(champion.reliability) if champion and champion.reliability else "",
        queue=_queue(status),
        saved=[its for its in report.versions if its.labels_saved],
        turnaround=_turnaround(report),
        cost=_cost(report.cost) if report.cost else None,
        how_far=how_far(status.progress) if status.progress else "",
        moment=moment,
        share=_share,
    )


def _tiles(report: Report) -> Iterator[dict[str, str]]:
    """The figures of the head."""
    status = report.status
    measured = {its.version: its for its in report.versions}
    if status.champion:
        own = measured.get(status.champion.version)
        bounds = f"{_bounds(own.metric)}, " if own and own.metric else ""
        where = f"{bounds}version {status.champion.version}, which serves"
        yield _tile(METRIC_TITLES[status.champion.metric], f"{status.champion.value:.1%}", where)
    else:
        yield _tile("champion", "none yet", "the first version that is trained serves")
    annotations = "–" if status.annotations is None else f"{status.annotations:,}"
    yield _tile("annotations", annotations, _next(status))
    saved = status.queue.labels_saved
    note = f"{_bounds(saved.share)}, against a random order" if saved else "not measured: the control share is too small yet"
    yield _tile("labels saved", f"{saved.share.value:.0%}" if saved else "–", note)
    kept = next((row for row in reversed(status.versions) if row.acceptance), None)
    if kept and kept.acceptance:
        share = f"{kept.acceptance.kept / kept.acceptance.shown:.0%}"
        yield _tile("pre-annotations kept", share, f"of {kept.acceptance.shown:,} of version {kept.version}")
    else:
        yield _tile("pre-annotations kept", "–", "nobody has had one before them yet")
    if report.cost:
        yield _tile("an idle month on AWS", dollars(report.cost.idle), f"a training: {dollars(report.cost.training)} at the most")


def _tile(title: str, value: str, note: str) -> dict[str, str]:
    return {"title": title, "value": value, "note": note}


def _next(status: Status) -> str:
    if status.next_training is None:
        return "Label Studio does not say how many"
    if status.running:
        return f"a training with {status.running.n_annotations:,} runs"
    due = "at the next look" if status.next_training.now else f"at {status.next_training.due_at:,}"
    return f"the next training starts {due}"


def _waiting(status: Status) -> str:
    """What is said where there is no version yet."""
    if status.running:
        return "No version yet; the first training runs."
    if status.next_training is None:
        return "No version yet."
    if status.next_training.now:
        return "No version yet; the first training starts at the next look."
    return f"No version yet; the first training starts at {counted(status.next_training.due_at, 'annotation')}."


def _row(row: Version, its: Measured) -> dict[str, str]:
    metric = f"{row.value:.1%}" if row.metric else "–"
    return {
        "version": str(row.version),
        "annotations": f"{row.annotations:,}",
        "metric": metric,
        "bounds": _bounds(its.metric) if its.metric else "",
        "images": f"{row.holdout_images:,}",
        "difference": points(row.difference) if row.difference else "–",
        "verdict": row.verdict,
        "champion": "champion" if row.champion else "",
        "calibration": "–" if row.calibration_error is None else f"{row.calibration_error:.1%}",
        "reason": row.reason,
        "kept": f"{row.acceptance.kept:,}" if row.acceptance else "–",
        "shown": f"{row.acceptance.shown:,}" if row.acceptance else "–",
        "acceptance": f"{its.acceptance.value:.0%}" if its.acceptance else "–",
        "acceptance_bounds": _bounds(its.acceptance) if its.acceptance else "",
        "acceptance_width": f"{100 * its.acceptance.value:.1f}" if its.acceptance else "0",
    }


def _class(name: str, images: int, value: float | None) -> dict[str, str]:
    return {
        "name": name,
        "images": f"{images:,}",
        "value": "–" if value is None else f"{value:.1%}",
        "width": f"{100 * (value or 0):.1f}",
    }


def _queue(status: Status) -> list[dict[str, str]]:
    """What the tasks are, of all of them; nothing where Label Studio does not say."""
    if not status.tasks or status.annotations is None or status.predicted is None:
        return []
    parts = {
        "annotated": status.annotations,
        "predicted by the champion, open": status.predicted,
        "open, without its prediction": status.tasks - status.annotations - status.predicted,
    }
    return [
        {"name": name, "count": f"{max(count, 0):,}", "width": f"{100 * max(count, 0) / status.tasks:.2f}", "colour": colour}
        for (name, count), colour in zip(parts.items(), (GOOD, BLUE, "#8c97a3"), strict=True)
    ]


def _turnaround(report: Report) -> dict[str, Any] | None:
    last = report.turnaround
    if last is None or not last.seconds:
        return None
    whole = sum(last.seconds.values())
    training = sum(last.seconds.get(phase, 0.0) for phase in TRAINING)
    return {
        "version": last.version,
        "annotations": counted(last.annotations, "annotation"),
        "job": last.job_name,
        "whole": f"{whole:,.0f} s",
        "beyond": f"{whole - training:,.0f} s",
        "parts": [
            {
                "name": name,
                "seconds": f"{seconds:,.1f}",
                "width": f"{100 * seconds / max(last.seconds.values()):.1f}" if seconds else "0",
                "training": name in TRAINING,
            }
            for name, seconds in last.seconds.items()
        ],
    }


def _cost(estimate: Estimate) -> dict[str, Any]:
    spot = "spot" if estimate.spot else "on demand"
    return {
        "lines": [
            ("an idle month", dollars(estimate.idle), f"with {counted(estimate.images, 'image')}, after AWS's allowances"),
            ("a training", dollars(estimate.training), f"at most {estimate.minutes:,} minutes of {estimate.instance}, {spot}"),
            ("1,000 predictions", dollars(estimate.thousand_predictions), "for annotators who open tasks"),
            ("instead, a month", dollars(estimate.always_on), "machines that always run: backend, MLflow, GPU"),
        ],
        "stage": estimate.stage,
        "region": estimate.region,
        "elsewhere": of_another_region(estimate.region, estimate.stage_region),
        "checked": str(estimate.checked),
    }  # fmt: skip


def _share(interval: Interval) -> str:
    return f"{interval.value:.0%} ({_bounds(interval)})"


def _bounds(interval: Interval) -> str:
    low, high = f"{100 * interval.low:.1f}", f"{100 * interval.high:.1f}"
    return f"{low} to {high} %"


def _learning_curve(report: Report) -> Markup:
    """The metric over annotations, a mark for each verdict."""
    status, measured = report.status, {its.version: its.metric for its in report.versions}
    rows = sorted((row for row in status.versions if row.metric), key=lambda row: (row.annotations, row.version))
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    axes.plot([row.annotations for row in rows], [row.value for row in rows], color=INK, alpha=0.35, lw=1.5, zorder=1)
    for verdict, (mark, colour) in _MARKS.items():
        some = [row for row in rows if row.verdict == verdict]
        if not some:
            continue
        intervals = [measured.get(row.version) or Interval(value=row.value, low=row.value, high=row.value) for row in some]
        lengths = [[its.value - its.low for its in intervals], [its.high - its.value for its in intervals]]
        axes.errorbar(
            [row.annotations for row in some],
            [row.value for row in some],
            yerr=lengths,
            fmt=mark,
            ms=9,
            color=colour,
            elinewidth=1.8,
            capsize=5,
            label=verdict,
            zorder=3,
        )
    for row in rows:
        name = f"v{row.version}"
        axes.annotate(name, (row.annotations, row.value), (9, 6), textcoords="offset points", color=INK)
    for row in rows:
        if row.champion:
            axes.plot([row.annotations], [row.value], "o", ms=17, mfc="none", mec=BLUE, mew=2.2, label="champion", zorder=4)
    axes.set(xlabel="annotations", ylabel=METRIC_TITLES[status.metric], title="")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.08)
    _plain(axes)
    figure.legend(loc="outside upper right", ncols=4)
    said = ", ".join(f"version {row.version} {row.value:.1%} at {row.annotations:,}" for row in rows)
    return svg(figure, "learning-curve", f"{METRIC_TITLES[status.metric]} over annotations: {said}")


def _confusion(champion: ChampionReport) -> Markup:
    matrix, names = champion.confusion or [], [its.name for its in champion.classes]
    side = min(9.6, 4.4 + 0.22 * len(names))
    figure = Figure(figsize=(side, 0.85 * side), layout="constrained")
    most = max((count for row in matrix for count in row), default=0)
    draw_confusion(figure.subplots(), matrix, "", names, most)
    right = sum(matrix[number][number] for number in range(len(matrix)))
    return svg(figure, "confusion", f"confusion matrix: {right:,} of {counted(champion.holdout_images, 'holdout image')} right")


def _reliability(bins: Sequence[Bin]) -> Markup:
    """How often predictions are right, over their score, and how many there are of each."""
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.5, lw=1, ls=(0, (4, 3)), label="what the score says")
    shares = [its.right for its in bins]
    lengths = [[its.value - its.low for its in shares], [its.high - its.value for its in shares]]
    scores = [its.score for its in bins]
    axes.errorbar(
        scores,
        [its.value for its in shares],
        yerr=lengths,
        fmt="o",
        color=BLUE,
        ms=7,
        capsize=4,
        lw=1.8,
        label="how often they are right",
    )
    axes.set(ylabel="are right", ylim=(-0.03, 1.05), xlim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside upper right", ncols=2)
    counts.bar(scores, [its.count for its in bins], width=0.05, color=BLUE, alpha=0.6)
    counts.set(ylabel="predictions", xlabel="score of a prediction")
    counts.xaxis.set_major_formatter(PercentFormatter(1.0))
    for each in (axes, counts):
        _plain(each)
    said = ", ".join(f"{its.right.value:.0%} right at a score of {its.score:.0%}" for its in bins)
    return svg(figure, "reliability", f"reliability: {said}")


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.2, color=INK)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
