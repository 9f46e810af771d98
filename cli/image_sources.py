"""Which files an upload is about: from files, folders, globs and CSV files, each with the name it gets and its classes.

Everything that makes the whole command pointless is an error before anything happens; what is wrong with one file is a refusal
that leaves the others alone.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from labelloop.artifacts import is_plain_key
from labelloop.errors import ConfigError, RequestError
from labelloop.label_studio.payloads import can_be_shown
from labelloop.model_config import ModelConfig

IMAGE, LABEL = "image", "label"  # columns
SEPARATOR = "|"  # between several classes in one cell
_WILDCARD = re.compile(r"[*?\[]")
_KEY_BYTES = 1024  # S3's limit
_SHOWN = 10  # rows of a table's error
_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}


@dataclass(frozen=True)
class Source:
    """One file: `name` below the model's prefix, and what a person has said of it; None means that nobody has."""

    name: str
    path: Path
    labels: tuple[str, ...] | None = None


@dataclass
class Sources:
    """The files to upload by name, and those that cannot be by path, with the reason. `notes`: what may not have been meant."""

    images: dict[str, Source] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, source: Source, prefix: str) -> None:
        """Take a file in, or refuse it. A file given twice counts once."""
        known = self.images.get(source.name)
        if known and os.path.realpath(known.path) == os.path.realpath(source.path):
            if known.labels != source.labels:
                self.refused[str(source.path)] = "is given twice, with different classes; the first ones count"
            return
        reason = _problem(source, prefix)
        if known and not reason:
            reason = f"{known.path} has the same name, {source.name}; rename one, or give the folder above both"
        if reason:
            self.refused[str(source.path)] = reason
        else:
            self.images[source.name] = source


def gather(given: Sequence[str], config: ModelConfig, *, labels_from_folders: bool = False) -> Sources:
    """The images of files, folders, globs and CSV files.

    A file of a folder keeps its path inside it, one of a glob its path below the part without wildcards, one of a CSV file its
    path in there; others keep their own name. Raises `ConfigError` and `RequestError` for what is wrong with the command as a
    whole: a path that does not exist, a folder without files, a CSV file without the column, an unknown class.
    """
    if labels_from_folders:
        _demand_one_class_an_image(config)
    tables = [Path(word) for word in given if word.lower().endswith(".csv") and Path(word).is_file()]
    found = Sources()
    listed = [source for word in given if Path(word) not in tables for source in _files(word, found)]
    if labels_from_folders:
        listed = [Source(source.name, source.path, (source.path.absolute().parent.name,)) for source in listed]
        _demand_known_folders(listed, config)
    for table in tables:
        listed += _table(table, config, found)
    for source in listed:
        found.add(source, config.images_prefix)
    return found


def _files(word: str, found: Sources) -> Iterator[Source]:
    """The files that one word of the command line means."""
    if not word:
        raise RequestError("one of the paths is empty; for the folder that you are in give .")
    path = Path(word)
    if path.is_dir():
        inside = list(_below(path, found))
        if not inside:
            raise RequestError(f"{path} holds no files; name the folder that holds the images")
        for file in inside:
            yield Source(file.relative_to(path).as_posix(), file)
    elif os.path.lexists(path):
        yield Source(path.name, path)
    elif _WILDCARD.search(word):
        yield from _matches(word)
    else:
        raise RequestError(f"{path} does not exist")


def _matches(pattern: str) -> Iterator[Source]:
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if _WILDCARD.search(part))
    folder = Path(*parts[:fixed])
    names = [match.relative_to(folder) for match in sorted(folder.glob("/".join(parts[fixed:])))]
    seen = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    files = [name for name in seen if not (folder / name).is_dir()]
    if not files:
        raise RequestError(f"{pattern} matches no file" + (", only folders; give the folder" if seen else ""))
    for name in files:
        yield Source(name.as_posix(), folder / name)


def _below(folder: Path, found: Sources) -> Iterator[Path]:
    """The files of a folder and its folders, in order, hidden ones aside; folders that cannot be read are refused."""

    def refuse(error: OSError) -> None:
        found.refused[str(error.filename)] = f"cannot be read: {error.strerror}"

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def _problem(source: Source, prefix: str) -> str | None:
    """Why a file cannot be uploaded, as far as its name and kind tell."""
    try:
        mode = source.path.stat().st_mode
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(mode):
        return "is no file"
    if source.path.suffix.lower() in _ARCHIVES:
        return "is an archive; unpack it, and give the folder"
    try:
        key = (prefix + source.name).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    if len(key) > _KEY_BYTES:
        return f"its name is too long: S3 takes {_KEY_BYTES} bytes, it would have {len(key)}; shorten it"
    if not is_plain_key(prefix + source.name):
        return "its name has an empty or dotted part, or a control character; rename it"
    if not can_be_shown(source.name):
        return "Label Studio cannot show an image with a ? in its name; rename it"
    return None


def _table(table: Path, config: ModelConfig, found: Sources) -> list[Source]:
    """The rows of a CSV file. Raises `ConfigError` when it is no such table, or names a class that the model has not."""
    sources: list[Source] = []
    unknown: list[str] = []
    for number, row in _rows(table, found):
        cell = (row[IMAGE] or "").strip()
        name = PurePosixPath(cell)
        if None in row:  # cells beyond the header
            several = f"; several classes go into one, separated by {SEPARATOR}" if config.problem_type == "multilabel" else ""
            found.refused[f"{table}:{number}"] = (
                f"the row has more cells than the header; put one with a comma in quotes{several}"
            )
            continue
        if "\0" in cell:
            found.refused[f"{table}:{number}"] = f"the row's {IMAGE} has a character that no file's name can have"
            continue
        if not cell:
            found.refused[f"{table}:{number}"] = f"the row names no {IMAGE}"
            continue
        if name.is_absolute() or ".." in name.parts:
            found.refused[f"{table}:{number}"] = f"{cell} lies outside the CSV file's folder; move it there, or the CSV file up"
            continue
        labels = _labels(row.get(LABEL) or "", config)
        unknown += [f"line {number}: {_unknown(label, config)}" for label in labels or () if label not in config.classes]
        sources.append(Source(name.as_posix(), table.parent / name, labels))
    if not sources and not found.refused:
        raise ConfigError(table, "has no rows below its header")
    if config.problem_type == "detection" and any(source.labels for source in sources):
        raise ConfigError(table, "a class alone cannot say where; remove the column, and draw boxes in the project", LABEL)
    if unknown:
        more = f"; and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
        raise ConfigError(table, "; ".join(unknown[:_SHOWN]) + more, LABEL)
    return sources


def _rows(table: Path, found: Sources) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """A CSV file's rows with their line numbers; columns that say nothing here are noted in `found`."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if IMAGE not in columns:
                has = f"it has: {', '.join(columns)}" if columns else "it is empty"
                raise ConfigError(table, f"has no column {IMAGE!r} in its first line; {has} (columns are separated by commas)")
            if twice := [column for column in (IMAGE, LABEL) if columns.count(column) > 1]:
                raise ConfigError(table, f"has the column {twice[0]!r} twice; an image has one row, and a row one cell of each")
            near = [column for column in columns if column.strip().lower() in (LABEL, f"{LABEL}s")]
            if near and LABEL not in columns:
                raise ConfigError(table, f"has no column {LABEL!r}, did you mean {near[0]!r}? Rename it, or remove it")
            others = [column for column in columns if column.strip() and column != IMAGE]
            if others and LABEL not in columns:
                found.notes.append(
                    f"{table} annotates nothing: beside {IMAGE!r} it has no column {LABEL!r}, but: {', '.join(others)}"
                )
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise ConfigError(table, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(table, f"is not UTF-8 text; save it as CSV UTF-8: {error}") from error
    except csv.Error as error:
        raise ConfigError(table, f"is no CSV: {error}") from error


def _labels(cell: str, config: ModelConfig) -> tuple[str, ...] | None:
    """The classes that a cell names, each once; an empty one says nothing about the image."""
    if not cell.strip():
        return None
    if config.problem_type != "multilabel":
        return (cell.strip(),)
    return tuple(dict.fromkeys(label.strip() for label in cell.split(SEPARATOR) if label.strip())) or None


def _demand_one_class_an_image(config: ModelConfig) -> None:
    if config.problem_type == "multilabel":
        raise RequestError(
            f"{config.name} takes several classes an image, and a folder is one; give a CSV file with the columns {IMAGE} and "
            f"{LABEL} (classes separated by {SEPARATOR}) in place of --labels-from-folders"
        )
    if config.problem_type == "detection":
        raise RequestError(
            f"{config.name} wants boxes, and a folder cannot say where in the image; leave --labels-from-folders out, "
            "and draw the boxes in the project"
        )


def _demand_known_folders(sources: Sequence[Source], config: ModelConfig) -> None:
    folders = dict.fromkeys(label for source in sources for label in source.labels or ())
    unknown = [_unknown(folder, config) for folder in folders if folder not in config.classes]
    if unknown:
        raise RequestError(f"not every folder is a class of {config.name}: {'; '.join(unknown)}; rename them")


def _unknown(label: str, config: ModelConfig) -> str:
    near = difflib.get_close_matches(label, config.classes, n=1) or [c for c in config.classes if c.lower() == label.lower()]
    return f"{label!r} is no class" + (f", did you mean {near[0]!r}?" if near else f" of {_some(config.classes)}")


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:_SHOWN]) + (", …" if len(classes) > _SHOWN else "")
