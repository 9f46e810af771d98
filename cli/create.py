"""A new model: its folder under model_configs, written from the templates of its problem type."""

from __future__ import annotations

import colorsys
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import yaml

from labelloop import model_config
from labelloop.errors import ConfigError
from labelloop.model_config import NAME, ModelConfigs
from labelloop.problem_types import PROBLEM_TYPES
from labelloop.records import ProblemTypeName
from labelloop.settings import Settings

FILES = ("config.yaml", "labeling_template.xml", "model.py")
SCHEMA_FILE = "config.schema.json"
PRETRAINED, CUSTOM = "pretrained", "custom"

_CUSTOM_NAMES: dict[ProblemTypeName, str] = {
    "classification": "small_cnn",
    "multilabel": "small_cnn",
    "detection": "small_fcos",
}
_CUSTOM_SIZES: dict[ProblemTypeName, int] = {"classification": 64, "multilabel": 64, "detection": 128}  # pixels
_DETECTOR_SIZE = 512  # pixels, where the architecture's name tells none
_INSTRUCTIONS: dict[ProblemTypeName, str] = {
    "classification": "Choose the class that the image shows. Skip what nobody could tell.",
    "multilabel": "Choose every class that the image shows; none where it shows none of them.",
    "detection": "Draw a tight box around everything of these classes; submit without boxes where there is nothing.",
}
_OPTIONS = {  # key of the config → the option that it comes from
    "name": "--model",
    "classes": "--classes",
    "architecture": "--weights",  # the section's own rule is about them
    "architecture.name": "--architecture",
    "architecture.weights": "--weights",
    "image": "--image-size",
    "image.width": "--image-size",
    "image.height": "--image-size",
    "label_studio.title": "--title",
    "retrain": "--train-at",
    "retrain.at": "--train-at",
}
_UNSEEN = ("Cc", "Cs", "Cn", "Zl", "Zp")  # Unicode's controls, halves of characters, what is none, line separators
_COMMENT_COLUMN, _LINE = 34, 130


@dataclass(frozen=True, kw_only=True)
class NewModel:
    """What a person asks for. `architecture`: `pretrained`, `custom` or a name of torchvision's.

    None stands for what suits the architecture. `image_size` is in pixels: a side, or width and height. Raises `ConfigError`,
    which names the option, for what cannot be used.
    """

    name: str
    problem_type: str
    classes: Sequence[str]
    architecture: str = PRETRAINED
    weights: str | None = None
    image_size: Sequence[int] | None = None
    train_at: Sequence[int] = (100, 500, 1000)
    title: str | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                "--model",
                f"{self.name!r} is no name of a model; use 2 to 32 lower-case letters, digits and _, a letter first",
            )
        if self.problem_type not in PROBLEM_TYPES:
            raise ConfigError("--problem-type", f"{self.problem_type!r} is none; choose {', '.join(PROBLEM_TYPES)}")
        if not all(name.strip() for name in self.classes):
            raise ConfigError("--classes", "holds an empty name; remove the comma too many")
        for option, text in (("--classes", "".join(self.classes)), ("--title", self.title or "")):
            if any(unicodedata.category(character) in _UNSEEN for character in text):
                raise ConfigError(option, "holds a line break or another character that cannot be seen; remove it")
        if self.image_size and len(self.image_size) > 2:
            raise ConfigError("--image-size", "wants pixels, such as 224, or width and height, such as 320x240")
        if self.is_custom and self.weights not in (None, "none"):
            raise ConfigError("--weights", "a network of your own starts from nothing; leave it out, or say none")

    @property
    def is_custom(self) -> bool:
        return self.architecture == CUSTOM

    @cached_property
    def kind(self) -> ProblemTypeName:
        return next(kind for kind in PROBLEM_TYPES if kind == self.problem_type)

    @cached_property
    def architecture_name(self) -> str:
        """What config.yaml names. Raises `ConfigError` with the list of those that suit."""
        if self.is_custom:
            return _CUSTOM_NAMES[self.kind]
        from training_jobs import architectures  # torch takes seconds

        if self.architecture == PRETRAINED:
            return architectures.DEFAULTS[self.kind]
        suitable = architectures.suitable(self.kind)
        if self.architecture not in suitable:
            raise ConfigError(
                "--architecture",
                f"{self.architecture!r} does not suit {self.kind}; choose {PRETRAINED}, {CUSTOM} or one of {', '.join(suitable)}",
            )
        return self.architecture

    @cached_property
    def starting_weights(self) -> str:
        if self.weights is not None:
            return self.weights
        return "none" if self.is_custom else "coco" if self.kind == "detection" else "imagenet"

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the network's input."""
        if self.image_size:
            return self.image_size[0], self.image_size[-1]
        side = _CUSTOM_SIZES[self.kind] if self.is_custom else _usual_size(self.kind, self.architecture_name)
        return side, side

    def render(self) -> dict[str, str]:
        """The folder's files by name."""
        width, height = self.size
        values: dict[str, Any] = {
            "name": self.name,
            "problem_type": self.kind,
            "classes": list(self.classes),
            "architecture": self.architecture_name,
            "weights": self.starting_weights,
            "custom": self.is_custom,
            "width": width,
            "height": height,
            "title": self.title or f"labelloop {self.name.replace('_', ' ').strip()}",
            "instructions": _INSTRUCTIONS[self.kind],
            "train_at": list(self.train_at),
            "colours": _colours(len(self.classes)),
            "hotkeys": _hotkeys(self.classes),
        }
        sources = ("config.yaml", "labeling_template.xml", f"{CUSTOM if self.is_custom else PRETRAINED}.py")
        return {
            file: _templates().get_template(f"{self.kind}/{source}.jinja").render(values)
            for file, source in zip(FILES, sources, strict=True)
        }


def create(root: Path, wanted: NewModel, *, force: bool = False) -> Path:
    """Write the model's folder and the schema for editors into `root`, which may be missing yet; returns the folder.

    Everything is written to the side, read as every command reads it, and only then put in its place. `force` replaces the
    three files of a folder that exists and leaves its others alone. Raises `ConfigError`.
    """
    folder = root / wanted.name
    if folder.exists() and not force:
        raise ConfigError(folder, "exists already; choose another name, or add --force to replace its " + ", ".join(FILES))
    files = wanted.render()
    scratch = root / f".{wanted.name}.new"  # in the same file system; no model has such a name
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        made = scratch / wanted.name
        made.mkdir(parents=True)
        for name, text in files.items():
            (made / name).write_text(text, encoding="utf-8")
        _validate(ModelConfigs(scratch), wanted, folder)
        write_schema(root)
        _put_in_place(made, folder, scratch / "before")
    except OSError as error:
        raise ConfigError(folder, f"cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def models_folder() -> Path:
    """Where model configs are written: the folder that the environment names, or the repository's. Raises `ConfigError`."""
    given = Settings().model_configs
    if given:
        return Path(given)
    spec = PathFinder.find_spec("model_configs")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("model_configs", "no such folder; run the command in the repository")
    return Path(next(iter(spec.submodule_search_locations)))


def numbers_of(text: str, separator: str, option: str) -> tuple[int, ...]:
    """The whole numbers of an option such as `100,500` or `320x240`. Raises `ConfigError`."""
    try:
        return tuple(int(number) for number in text.split(separator))
    except ValueError:
        raise ConfigError(option, f"{text!r} is not made of whole numbers with {separator!r} between them") from None


def schema_text() -> str:
    """The JSON schema of config.yaml, as it lies beside the models."""
    return msgspec.json.format(msgspec.json.encode(model_config.schema())).decode() + "\n"


def write_schema(root: Path) -> Path:
    """Bring `config.schema.json` up to date; returns the file."""
    file, text = root / SCHEMA_FILE, schema_text()
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        unfinished = root / f".{SCHEMA_FILE}.new"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    return file


def describe(path: str) -> str:
    """What a key of config.yaml means, on one line: `hyperparameters.epochs`, or a section's name."""
    definitions = model_config.schema()["$defs"]
    found: dict[str, Any] = {"$ref": "#/$defs/ModelConfig"}
    for key in path.split("."):
        found = _resolved(found, definitions)["properties"][key]
    return " ".join(str({**_resolved(found, definitions), **found}["description"]).split())


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` refers to, also that of an optional section."""
    for candidate in (schema, *schema.get("anyOf", [])):
        if "$ref" in candidate:
            resolved: dict[str, Any] = definitions[candidate["$ref"].rpartition("/")[2]]
            return resolved
    return schema


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cli"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - YAML and Python; the XML escapes what is not its own
    )
    environment.globals.update(entry=_entry, section=_section)
    return environment


def _entry(path: str, value: object) -> str:
    """A key of config.yaml with its value and what it means: beside it, or above where there is no room."""
    indent, key, meaning = "  " * path.count("."), path.rpartition(".")[2], describe(path)
    line = f"{indent}{key}: {_as_yaml(value)}"
    beside = f"{line:<{_COMMENT_COLUMN}} # {meaning}"
    if len(line) < _COMMENT_COLUMN and len(beside) <= _LINE:
        return beside
    return "\n".join([*_comment(meaning, indent), line])


def _section(name: str) -> str:
    return "\n".join([*_comment(describe(name), ""), f"{name}:"])


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _LINE, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _as_yaml(value: object) -> str:
    """On one line, with quotes where YAML would take a text for something else."""
    in_list: str = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=float("inf"))
    return in_list.strip()[1:-1]


def _colours(count: int) -> list[str]:
    """Colours as far from each other as so many can be."""
    shades = [colorsys.hls_to_rgb(number / count, 0.45, 0.8) for number in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in shade) for shade in shades]


def _hotkeys(classes: Sequence[str]) -> list[str]:
    """Keys for the first ten classes; classes that are keys themselves have their own."""
    own = all(re.fullmatch("[0-9a-z]", name) for name in classes)
    return list(classes) if own else list("1234567890"[: len(classes)])


def _usual_size(kind: ProblemTypeName, architecture: str) -> int:
    """The side, in pixels, of the images that the pretrained network has seen."""
    if kind == "detection":
        named = re.search(r"(?<=ssd|ite|ge_)[0-9]{3}", architecture)  # ssd300_…, ssdlite320_…, …_large_320_fpn
        return int(named[0]) if named else _DETECTOR_SIZE
    from torchvision.models import get_model_weights

    crop: list[int] = get_model_weights(architecture).DEFAULT.transforms().crop_size
    return crop[0]


def _validate(models: ModelConfigs, wanted: NewModel, folder: Path) -> None:
    """Read what was written through the real loader; a mistake names the option that it comes from."""
    made = models[wanted.name]
    try:
        config, _ = made.config, made.label_config
        if not wanted.is_custom:
            from training_jobs import architectures

            architectures.check(config)
    except ConfigError as error:
        option = _OPTIONS.get(error.key) or _OPTIONS.get(error.key.partition("[")[0])
        message = str(error).removeprefix(f"{error.where}: ").removeprefix(f"{error.key}: ")
        raise ConfigError(option or folder / Path(error.where).name, message, "" if option else error.key) from error


def _put_in_place(made: Path, folder: Path, before: Path) -> None:
    """Rename what is made to `folder`; where that exists, change its files all together or not at all."""
    if not folder.exists():
        made.rename(folder)
        return
    before.mkdir()
    kept = [name for name in FILES if (folder / name).exists()]
    for name in kept:
        shutil.copy2(folder / name, before / name)
    try:
        for name in FILES:
            (made / name).replace(folder / name)
    except OSError:
        for name in FILES:
            if name in kept:
                (before / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
