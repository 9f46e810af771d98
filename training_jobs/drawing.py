"""Pages that need nothing else, and the figures on them: SVG that stands within the HTML, in its colours, light or dark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labelloop.wording import counted

INK = "#1d2733"  # in a figure it stands for the page's own colour of text
GOOD, BAD, UNSURE, BLUE = "#1b8a4b", "#c0392f", "#b07d10", "#2f6fb5"  # told apart on white and on black
_ON_LIGHT, _ON_DARK = "#10202f", "#ffffff"  # numbers on cells, which have the same colours on every page
_LEGIBLE = 0.63  # of their width, below which figures are not shrunk
_LONGEST = 20  # characters of a name beside a matrix
_NUMBERED = 20  # classes up to which a confusion matrix shows its numbers
_NAMED = 60  # classes up to which it names them


def render(template: Path, **content: Any) -> str:
    """The page of a template, which may extend `page.html.jinja`. What it is given is text, unless it is `Markup`."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["counted"] = counted
    return environment.get_template(template.name).render(**content)


def draw_confusion(axes: Axes, matrix: Sequence[Sequence[int]], title: str, classes: Sequence[str], most: int) -> None:
    """A confusion matrix, a row for each true class; `most`: the count that is darkest."""
    # A logarithmic scale: mistakes are few beside what is right, and are what one looks for.
    scale = matplotlib.colors.SymLogNorm(linthresh=1, vmin=0, vmax=max(most, 1))
    counts = np.array(matrix, dtype=np.float64)
    axes.imshow(np.where(counts > 0, counts, np.nan), cmap="Blues", norm=scale)
    axes.set(title=title, xlabel="predicted", ylabel="annotated")
    axes.spines[:].set_alpha(0.25)
    if len(classes) > _NAMED:
        axes.set(xticks=[], yticks=[])
        return
    names = [_as_text(name) for name in classes]
    size = 9 if len(classes) <= _NUMBERED else 5
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(classes) > _NUMBERED:
        return
    for row, its in enumerate(matrix):
        for column, count in enumerate(its):
            if count:
                colour = _ON_DARK if scale(count) > 0.55 else _ON_LIGHT
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=size)


def _as_text(name: str) -> str:
    """A name as matplotlib draws it: no formula, and not longer than the matrix."""
    short = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
    return short.replace("$", r"\$")


def svg(figure: Figure, name: str, description: str) -> Markup:
    """A figure to stand within the page; `name` keeps its ids apart from the others'. matplotlib escapes what it draws.

    `description`: for who cannot see it.
    """
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
    for legend in figure.legends:
        legend.get_frame().set_visible(False)
        for text in legend.get_texts():
            text.set_color(INK)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["system-ui", "DejaVu Sans"]}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    drawn = file.getvalue().replace(INK, "currentColor")
    width = round(96 * figure.get_figwidth())  # CSS pixels
    style = f"max-width: {width}px; min-width: {round(_LEGIBLE * width)}px"
    label = Markup('<svg role="img" aria-label="{}" style="{}"').format(description, style)
    return label + Markup(drawn[drawn.index("<svg") + len("<svg") :])  # noqa: S704 - see above
