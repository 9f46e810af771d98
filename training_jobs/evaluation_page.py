"""The evaluation report as a page that a person can read: one HTML file that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labelloop.dataset import resolution
from labelloop.promotion import in_points
from labelloop.records import METRIC_TITLES, Comparison, Evaluation, GateRules, Interval, Metric, Region, Scores, Verdict
from labelloop.wording import counted
from training_jobs.drawing import BAD, GOOD, INK, draw_confusion, render, svg

_HEADLINES: dict[Verdict, str] = {
    "promote": "Promote: it takes over",
    "keep": "Keep: the champion goes on serving",
    "undecided": "Undecided: the champion goes on serving",
    "shadow": "Shadow: it runs unseen beside the champion before it may serve",
}
FIGURES: dict[Metric, str] = {"accuracy": "recall", "f1": "F1", "map_50": "average precision"}


def write(evaluation: Evaluation, file: Path) -> None:
    """Write the page of a complete report: its verdict is there and its version is known."""
    comparison, rules = evaluation.comparison, evaluation.gate
    page = render(
        Path(__file__).with_name("evaluation.html.jinja"),
        report=evaluation,
        comparison=comparison,
        verdict=_HEADLINES[evaluation.verdict],
        tiles=_tiles(evaluation),
        figure=FIGURES[evaluation.challenger.metric],
        difference_plot=_difference_plot(comparison, evaluation) if comparison else "",
        explanation=_explanation(comparison, rules) if comparison else "",
        classes=_classes(evaluation),
        floor=f"{100 * rules.class_floor:.3g}",
        confusion_plot=_confusion_plot(evaluation),
        resolution=_resolution(evaluation),
        labels=_labels,
    )
    file.write_text(page, encoding="utf-8")


def _tiles(evaluation: Evaluation) -> list[dict[str, str]]:
    """The figures of the head."""
    metric, champion, comparison = METRIC_TITLES[evaluation.challenger.metric], evaluation.champion, evaluation.comparison
    tiles = [(metric, f"{evaluation.challenger.value:.1%}", f"on {counted(len(evaluation.holdout), 'holdout image')}")]
    if champion:
        before = evaluation.champion_annotations
        trained = f"trained on {counted(before, 'annotation')}" if before else "the champion"
        tiles.append((f"{metric} of version {champion.version}", f"{champion.value:.1%}", trained))
    if comparison:
        bounds = _bounds(comparison.difference)
        tiles.append(("difference", f"{100 * comparison.difference.value:+.1f} points", bounds))
    error = evaluation.calibration_error
    said = "confidence against how often it is right" if error is not None else "cannot be measured here"
    tiles.append(("calibration error", "–" if error is None else f"{error:.1%}", said))
    saved = evaluation.labels_saved
    tiles.append(
        ("labels saved", f"{saved.share.value:.0%}", f"{saved.share.low:.0%} to {saved.share.high:.0%}, against random order")
        if saved
        else ("labels saved", "–", "not measured: the control share is too small yet")
    )
    accept = evaluation.accept_from
    tiles.append(
        ("accepted without a person", f"from {accept:.1%}", "certainty")
        if accept is not None
        else ("accepted without a person", "none", "auto_accept is off, or nothing is precise enough")
    )
    tiles.append(("suspicious annotations", f"{len(evaluation.suspects):,}", "to be looked at again"))
    return [{"title": title, "value": value, "note": note} for title, value, note in tiles]


def _explanation(comparison: Comparison, rules: GateRules) -> str:
    test = f"McNemar's exact test: p = {comparison.p_value:.3g}. " if comparison.p_value is not None else ""
    return (
        f"Only this version has {counted(comparison.won, 'image')} right, only the champion {comparison.lost:,}. {test}"
        f"Each end of the interval holds with {rules.confidence:.3g} confidence "
        f"({'Tango' if comparison.p_value is not None else 'paired bootstrap over images'})."
    )


def _resolution(evaluation: Evaluation) -> str:
    images = len(evaluation.holdout)
    tell = counted(images, "holdout image tells", "holdout images tell")
    rule = f"As a rule {tell} apart versions that differ by {100 * resolution(images):.1f} points"
    if evaluation.comparison is None:
        return f"{rule}."
    difference, needed = evaluation.comparison.difference, evaluation.comparison.needed
    spread = 100 * max(difference.value - difference.low, difference.high - difference.value)
    more = f"; about {counted(needed, 'image')} would decide at this difference" if needed else ""
    return f"{rule}; these two from about {spread:.1f} points on{more}."


def _classes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for each class, in the config's order."""
    images = Counter(name for image in evaluation.holdout for name in {region.label for region in image.truth})
    changes = evaluation.comparison.per_class if evaluation.comparison else {}
    return [
        {
            "name": name,
            "images": images[name],
            "challenger": _share(evaluation.challenger, name),
            "champion": _share(evaluation.champion, name),
            **_change(changes.get(name)),
        }
        for name in evaluation.classes
    ]


def _share(scores: Scores | None, name: str) -> str:
    value = scores.per_class.get(name) if scores else None
    return "–" if value is None else f"{value:.1%}"


def _change(change: Interval | None) -> dict[str, str]:
    if change is None:
        return {"change": "–", "interval": "", "direction": ""}
    direction = "up" if change.low > 0 else "down" if change.high < 0 else ""
    return {"change": f"{100 * change.value:+.1f}", "interval": _bounds(change), "direction": direction}


def _bounds(interval: Interval) -> str:
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _labels(regions: Sequence[Region]) -> str:
    counts = Counter(region.label for region in regions)
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in counts.items()) or "nothing"


def _difference_plot(comparison: Comparison, evaluation: Evaluation) -> Markup:
    """The difference with its bounds, against no difference and against what is still allowed."""
    difference, margin = comparison.difference, evaluation.gate.margin
    low, value, high = (100 * number for number in (difference.low, difference.value, difference.high))
    colour = GOOD if low > 0 else BAD if high < 0 else INK
    figure = Figure(figsize=(9.6, 1.9), layout="constrained")
    axes: Axes = figure.subplots()
    axes.axvspan(-100 * margin, 0, color=INK, alpha=0.07, lw=0)
    axes.axvline(0, color=INK, lw=1)
    axes.axvline(-100 * margin, color=BAD, lw=1, ls=(0, (4, 3)))
    axes.errorbar([value], [0], xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=6, lw=2.5, ms=9)
    axes.annotate(in_points(difference), (value, 0), xytext=(0, 14), textcoords="offset points", ha="center", color=colour)
    reach = 1.25 * max(abs(low), abs(high), 100 * margin, 1)
    axes.set(xlim=(-reach, reach), ylim=(-0.6, 1), yticks=[])
    before = evaluation.champion.version if evaluation.champion else 0
    title = METRIC_TITLES[evaluation.challenger.metric]
    axes.set_xlabel(f"{title}, percentage points more than version {before}; dashed: the margin ({100 * margin:.3g})")
    axes.spines[["left", "right", "top"]].set_visible(False)
    return svg(figure, "difference", f"the difference to version {before}: {in_points(difference)}")


def _confusion_plot(evaluation: Evaluation) -> Markup | str:
    """Both confusion matrices side by side, on one scale; nothing for problems without."""
    shown = [("this version", evaluation.challenger)]
    if evaluation.champion:
        shown.append((f"version {evaluation.champion.version}", evaluation.champion))
    matrices = [(title, scores.confusion) for title, scores in shown if scores.confusion]
    if not matrices:
        return ""
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    most = max(count for _, matrix in matrices for row in matrix for count in row)
    for axes, (title, matrix) in zip(figure.subplots(1, 2), [*matrices, ("", [])][:2], strict=True):
        if matrix:
            draw_confusion(axes, matrix, title, evaluation.classes, most)
        else:
            axes.set_axis_off()
    return svg(figure, "confusion", "confusion matrix of " + " and of ".join(title for title, _ in matrices))
