"""config.yaml: the single source of truth about a model, its schema and its loader.

The schema is closed: an unknown key, a wrong type or a contradiction is a `ConfigError` that names file, key and remedy.
"""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Hashable
from functools import cached_property
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from labelloop.errors import ConfigError, UnknownModelError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.settings import Settings

NAME = re.compile(r"[a-z][a-z0-9_]{1,31}")

Positive = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Minutes = Annotated[float, msgspec.Meta(ge=0, le=525_600)]  # a year
Pixels = Annotated[int, msgspec.Meta(ge=8, le=4096)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Architecture(Section, frozen=True, kw_only=True):
    """`model.py` builds the network; `name` says what it is, for people and for MLflow."""

    name: str
    weights: Literal["none"] = "none"


class Image(Section, frozen=True, kw_only=True):
    """What the network sees. `oversampling`: a JPEG is decoded at no less than this multiple of the input's size."""

    width: Pixels
    height: Pixels
    mode: Literal["L", "RGB"] = "RGB"
    oversampling: Annotated[float, msgspec.Meta(ge=1, le=8)] = 2.0


class Hyperparameters(Section, frozen=True, kw_only=True):
    epochs: Positive
    batch_size: Positive
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=100)]
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    label_smoothing: Share = 0.0
    seed: int = 0


class LabelStudio(Section, frozen=True, kw_only=True):
    """The project of the model. A title has at least three characters, which Label Studio demands."""

    title: Annotated[str, msgspec.Meta(min_length=3, max_length=50)]
    instructions: str = ""
    sampling: Literal["Uncertainty sampling", "Uniform sampling", "Sequential sampling"] = "Uncertainty sampling"


class Splits(Section, frozen=True, kw_only=True):
    """Shares of the images; the rest trains. An image's split follows from its content and `seed` alone."""

    test: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.2
    validation: Share = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.test + self.validation >= 1:
            raise ValueError("test and validation together leave nothing to train on; make their sum smaller than 1")


class Retrain(Section, frozen=True, kw_only=True):
    """When to train: at each count of annotations in `at`, then whenever the last trained count has grown by `factor`.

    `cooldown_minutes` is the least time between two trainings; after a failure `failure_backoff_minutes` doubles with each.
    """

    at: Annotated[list[Positive], msgspec.Meta(min_length=1)]
    factor: Annotated[float, msgspec.Meta(gt=1, le=1000)] = 2.0
    cooldown_minutes: Minutes = 0
    failure_backoff_minutes: Minutes = 10

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in zip(self.at, self.at[1:], strict=False)):
            raise ValueError("`at` lists annotation counts in rising order, for example [100, 500, 1000]")


class Training(Section, frozen=True, kw_only=True):
    """The SageMaker training job."""

    instance_type: Annotated[str, msgspec.Meta(pattern=r"^ml\.")] = "ml.g5.xlarge"
    spot: bool = True
    max_runtime_minutes: Positive = 60
    volume_gb: Positive = 30


class Serving(Section, frozen=True, kw_only=True):
    """`memory_mb` of the predict function, which also decides its share of CPU; the largest of all models counts."""

    memory_mb: Annotated[int, msgspec.Meta(ge=512, le=10240)] = 1769


class ModelConfig(Section, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=f"^{NAME.pattern}$")]
    problem_type: Literal["classification"]
    classes: Annotated[list[Annotated[str, msgspec.Meta(min_length=1, max_length=200)]], msgspec.Meta(min_length=2)]
    architecture: Architecture
    image: Image
    hyperparameters: Hyperparameters
    label_studio: LabelStudio
    retrain: Retrain
    splits: Splits = Splits()
    training: Training = Training()
    serving: Serving = Serving()

    def __post_init__(self) -> None:
        doubled = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if doubled:
            raise ValueError(f"classes name {', '.join(doubled)} more than once")

    @property
    def images_prefix(self) -> str:
        """Where the model's images lie in the images bucket."""
        return f"images/{self.name}/"


class ModelFolder:
    """One folder of model_configs: config.yaml, labeling_template.xml and model.py.

    Both files are read when asked for and checked against each other; each problem is a `ConfigError`.
    """

    def __init__(self, folder: Path | Traversable) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> ModelConfig:
        file = self.folder / "config.yaml"
        config = parse(_read(file), where=str(file))
        if config.name != self.folder.name:
            raise ConfigError(str(file), f"is {config.name!r} but the folder is {self.folder.name!r}; make them equal", "name")
        return config

    @cached_property
    def template(self) -> str:
        return _read(self.folder / "labeling_template.xml")

    @cached_property
    def label_config(self) -> LabelConfig:
        """The parsed template; its labels are the config's classes."""
        file = str(self.folder / "labeling_template.xml")
        label_config = LabelConfig.parse(self.template, where=file)
        if set(label_config.labels) != set(self.config.classes):
            missing = sorted(set(self.config.classes) - set(label_config.labels))
            extra = sorted(set(label_config.labels) - set(self.config.classes))
            raise ConfigError(
                file,
                "does not offer the classes of config.yaml"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; unknown: {', '.join(extra)}" if extra else ""),
            )
        return label_config


class ModelConfigs:
    """All models of a folder: `model_configs/` of the repository, of a function's layer, or one given."""

    def __init__(self, root: Path | Traversable) -> None:
        self.root = root

    @classmethod
    def find(cls, settings: Settings | None = None) -> ModelConfigs:
        """The folder that the environment names, or the packaged one (a namespace package, in a layer as in a checkout)."""
        given = (settings or Settings()).model_configs
        if given:
            return cls(Path(given))
        try:
            return cls(importlib.resources.files("model_configs"))
        except ModuleNotFoundError:
            raise ConfigError("model_configs", "no such folder; run the command in the repository") from None

    @cached_property
    def names(self) -> list[str]:
        if not self.root.is_dir():
            raise ConfigError(str(self.root), "no such folder")
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and (entry / "config.yaml").is_file())

    @cached_property
    def _folders(self) -> dict[str, ModelFolder]:
        return {name: ModelFolder(self.root / name) for name in self.names}

    def __getitem__(self, model: str) -> ModelFolder:
        try:
            return self._folders[model]
        except KeyError:
            near = difflib.get_close_matches(model, self.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.names) or 'none'}"
            raise UnknownModelError(f"no model {model!r}; {hint}") from None


def parse(text: str, *, where: str) -> ModelConfig:
    """Read a config.yaml. `where` names it in errors. Raises `ConfigError`."""
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - it is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(where, f"is not valid YAML: {error}") from error
    try:
        return msgspec.convert(data, ModelConfig, strict=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise ConfigError(where, _with_remedy(message), path.strip("`.")) from error


def schema() -> dict[str, Any]:
    """JSON schema of config.yaml, for editors."""
    return msgspec.json.schema(ModelConfig)


def _read(file: Path | Traversable) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(file), "no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), f"is not UTF-8 text: {error}") from error


def _with_remedy(message: str) -> str:
    unknown = re.search(r"unknown field `([^`]+)`", message)
    if unknown:
        known = {name for section in Section.__subclasses__() for name in section.__struct_fields__}
        near = difflib.get_close_matches(unknown[1], sorted(known), n=1)
        return f"unknown key {unknown[1]!r}; " + (f"did you mean {near[0]!r}?" if near else "remove it")
    missing = re.search(r"missing required field `([^`]+)`", message)
    if missing:
        return f"the key {missing[1]!r} is missing; add it"
    if message.startswith("Expected `str`"):
        return f"{message}; put it in quotes"
    return message


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the second of two equal keys win in silence; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
