"""config.yaml: the single source of truth about a model, its schema and its loader.

The schema is closed: an unknown key, a wrong type or a contradiction is a `ConfigError` that names file, key and remedy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from labelloop import problem_types
from labelloop.closed_schema import Section, convert
from labelloop.errors import ConfigError, UnknownModelError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.records import BoxRules, GateRules, ModelCard, ProblemTypeName
from labelloop.settings import Settings

_STATE_DICT = re.compile(r"s3://[^/]+/.+\.pth?")
NAME = re.compile(r"[a-z][a-z0-9_]{1,31}")

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Size = Meta(ge=8, le=4096)
Share = Meta(ge=0, lt=1)
Between = Meta(gt=0, lt=1)
Count = Meta(ge=1)
Minutes = Meta(ge=0, le=525_600)  # a year


class Architecture(Section, frozen=True, kw_only=True):
    """Which network model.py builds and what it starts from."""

    name: Annotated[str, Meta(min_length=1, description="a torchvision network, or any name for one of model.py's own")]
    weights: Annotated[
        str,
        Meta(description="what the network starts from: imagenet, coco (detection), none, or s3://bucket/key.pt (a state dict)"),
    ]

    def __post_init__(self) -> None:
        if self.weights not in ("none", "imagenet", "coco") and not _STATE_DICT.fullmatch(self.weights):
            raise ValueError(f"weights {self.weights!r} are none of: none, imagenet, coco, s3://bucket/key.pt")

    @property
    def weights_uri(self) -> str | None:
        """The S3 address of the weights, where they lie there."""
        return self.weights if self.weights.startswith("s3://") else None


class Image(Section, frozen=True, kw_only=True):
    """What the network sees; every image is scaled to this size."""

    width: Annotated[int, Size, Meta(description="pixels; larger finds smaller things and costs time in every prediction")]
    height: Annotated[int, Size, Meta(description="pixels")]
    mode: Annotated[Literal["L", "RGB"], Meta(description="RGB for colour, L for grey; pretrained networks want RGB")] = "RGB"
    oversampling: Annotated[
        float,
        Meta(ge=1, le=8, description="a JPEG is decoded at no less than this multiple of the input's size; smaller is faster"),
    ] = 2.0


class Hyperparameters(Section, frozen=True, kw_only=True):
    """How the network is trained."""

    epochs: Annotated[int, Count, Meta(description="passes over the training images")]
    batch_size: Annotated[int, Count, Meta(description="images a step, on all GPUs together; less when they run out of memory")]
    learning_rate: Annotated[
        float,
        Meta(gt=0, le=100, description="largest step size (AdamW); it rises over the first tenth of the steps, then falls to 0"),
    ]
    weight_decay: Annotated[
        float, Meta(ge=0, le=100, description="pull of the weights towards nothing; more against learning by heart")
    ] = 0.0
    label_smoothing: Annotated[
        float, Share, Meta(description="share of a target that goes to the other classes, against annotators' slips; 0 to 0.2")
    ] = 0.0
    seed: Annotated[int, Meta(description="the same snapshot with the same seed gives the same network")] = 0


class Detection(Section, frozen=True, kw_only=True):
    """Which of a detector's boxes are shown."""

    score_threshold: Annotated[float, Between, Meta(description="boxes with a lower score are not shown to annotators")] = 0.3
    iou_threshold: Annotated[
        float,
        Between,
        Meta(description="of two boxes of a class that overlap more than this (intersection over union), the better one stays"),
    ] = 0.5
    max_boxes: Annotated[int, Meta(ge=1, le=1000, description="the most boxes of an image")] = 100


class LabelStudio(Section, frozen=True, kw_only=True):
    """The Label Studio project."""

    title: Annotated[
        str, Meta(min_length=3, max_length=50, description="the project's title, 3 to 50 characters, its own among the models")
    ]
    instructions: Annotated[str, Meta(description="what annotators read before they begin; HTML is allowed")] = ""
    sampling: Annotated[
        Literal["Uncertainty sampling", "Uniform sampling", "Sequential sampling"],
        Meta(description="which task comes next: Uncertainty (least certain first), Uniform or Sequential sampling"),
    ] = "Uncertainty sampling"


class Splits(Section, frozen=True, kw_only=True):
    """Shares of the images; the rest trains. An image's split follows from its content group and the seed alone."""

    test: Annotated[float, Between, Meta(description="the holdout, on which versions are compared and never trained")] = 0.2
    validation: Annotated[float, Share, Meta(description="watched during training, never trained on")] = 0.1
    seed: Annotated[int, Meta(description="another seed deals the images out anew; older versions then compare with nothing")] = 0

    def __post_init__(self) -> None:
        if self.test + self.validation >= 1:
            raise ValueError("test and validation together leave nothing to train on; make their sum smaller than 1")


class Retrain(Section, frozen=True, kw_only=True):
    """When a training starts by itself."""

    at: Annotated[list[Annotated[int, Count]], Meta(min_length=1, description="numbers of annotations at which to train, rising")]
    factor: Annotated[
        float,
        Meta(gt=1, le=1000, description="after the last of them: train when the annotations have grown by this factor since"),
    ] = 2.0
    cooldown_minutes: Annotated[float, Minutes, Meta(description="least time between two trainings")] = 0.0
    failure_backoff_minutes: Annotated[
        float, Minutes, Meta(description="wait after a failed training; doubles with each further failure")
    ] = 10.0

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in zip(self.at, self.at[1:], strict=False)):
            raise ValueError("`at` lists annotation counts in rising order, for example [100, 500, 1000]")


class Promotion(Section, frozen=True, kw_only=True):
    """When a trained version takes over from the one that serves."""

    margin: Annotated[
        float, Share, Meta(description="how much lower the metric may be at worst, for a version trained on more annotations")
    ] = 0.02
    class_floor: Annotated[
        float, Between, Meta(description="no class may evidently get worse by more than this, whatever the others gain")
    ] = 0.1
    confidence: Annotated[
        float, Meta(ge=0.5, le=0.999, description="of the one-sided bounds that decide; more asks for more holdout images")
    ] = 0.95
    shadow: Annotated[
        int,
        Meta(ge=0, le=100_000, description="annotated tasks on which a version runs in shadow before it may serve; 0: none"),
    ] = 0


class Queue(Section, frozen=True, kw_only=True):
    """Which task annotators get next. The holdout is always asked for at random."""

    strategy: Annotated[
        Literal["uncertainty", "diverse", "random"],
        Meta(description="uncertainty: least certain first; diverse: the same, taking turns between kinds of images; or random"),
    ] = "uncertainty"
    control: Annotated[
        float, Share, Meta(description="share that is asked for at random, to measure how many labels the strategy saves")
    ] = 0.1
    clusters: Annotated[int, Meta(ge=2, le=256, description="kinds of images that `diverse` takes turns between")] = 8


class Review(Section, frozen=True, kw_only=True):
    """Which annotations are shown again because models that never saw them disagree."""

    limit: Annotated[int, Meta(ge=0, le=1000, description="the most at a time; 0 looks for none and saves the time")] = 50
    folds: Annotated[
        int, Meta(ge=2, le=10, description="parts of the training images; a model is trained for each, on all the others")
    ] = 4


class AutoAccept(Section, frozen=True, kw_only=True):
    """Let predictions that are precise enough become annotations by themselves. Without this section none do."""

    precision: Annotated[float, Between, Meta(description="share of them that has to be right, such as 0.99")]
    audit: Annotated[float, Between, Meta(description="share of them that people are asked all the same")] = 0.1


class Training(Section, frozen=True, kw_only=True):
    """The SageMaker training job; a laptop has no instances and ignores it."""

    instance_type: Annotated[
        str, Meta(pattern=r"^ml\.", description="SageMaker instance, such as ml.g5.xlarge (one GPU) or ml.m5.xlarge (none)")
    ] = "ml.g5.xlarge"
    fallback_instance_types: Annotated[
        list[Annotated[str, Meta(pattern=r"^ml\.")]],
        Meta(description="taken in turn where AWS has no such machine to spare, or the account no quota for it"),
    ] = msgspec.field(default_factory=list)
    spot: Annotated[bool, Meta(description="spare capacity: cheaper, may be interrupted and goes on from its checkpoint")] = True
    max_runtime_minutes: Annotated[int, Count, Meta(description="the job is stopped after so long")] = 60
    volume_gb: Annotated[int, Count, Meta(description="disk of the training instance")] = 30

    def instance_types(self, shortages: int = 0) -> list[str]:
        """The types to try, in order, after so many attempts that found no machine."""
        all_of = [self.instance_type, *self.fallback_instance_types]
        first = shortages % len(all_of)
        return all_of[first:] + all_of[:first]


class Serving(Section, frozen=True, kw_only=True):
    """The predict function."""

    memory_mb: Annotated[
        int, Meta(ge=512, le=10240, description="memory, and with it CPU (1769 is one vCPU); the largest of all models counts")
    ] = 1769
    int8: Annotated[
        Literal["auto", "never"],
        Meta(description="auto: a version serves as int8 where that is faster and not worse, as the training measures; or never"),
    ] = "auto"


class ModelConfig(Section, frozen=True, kw_only=True):
    """A model of labelloop: all there is to know of it."""

    name: Annotated[
        str,
        Meta(
            pattern=f"^{NAME.pattern}$",
            description="the folder's name; also in S3 prefixes, job names, MLflow and the backend's address",
        ),
    ]
    problem_type: Annotated[
        ProblemTypeName,
        Meta(description="classification: one class an image; multilabel: any number; detection: boxes with a class each"),
    ]
    classes: Annotated[
        list[Name], Meta(min_length=1, description="what annotators choose from, the same as in labeling_template.xml")
    ]
    architecture: Architecture
    image: Image
    hyperparameters: Hyperparameters
    label_studio: LabelStudio
    retrain: Retrain
    splits: Splits = Splits()
    promotion: Promotion = Promotion()
    queue: Queue = Queue()
    review: Review = Review()
    auto_accept: AutoAccept | None = None
    training: Training = Training()
    serving: Serving = Serving()
    detection: Detection | None = None

    def contradictions(self) -> list[tuple[str, str]]:
        """What is wrong between keys that are each right: (key, message)."""
        found = []
        doubled = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if doubled:
            found.append(("classes", f"name {', '.join(doubled)} more than once; remove the doubles"))
        if self.problem_type == "classification" and len(self.classes) < 2:
            found.append(("classes", "classification chooses between at least two classes; add one, or use multilabel"))
        if self.problem_type != "detection" and self.detection is not None:
            found.append(("detection", f"{self.problem_type} has no boxes; remove the section"))
        if self.problem_type != "detection" and self.architecture.weights == "coco":
            found.append(("architecture.weights", "coco's are a detector's; use imagenet, none or an address in S3"))
        if self.problem_type == "detection" and self.hyperparameters.label_smoothing:
            found.append(("hyperparameters.label_smoothing", "detection does not know it; remove the key"))
        return found

    @property
    def box_rules(self) -> BoxRules | None:
        """How boxes are sifted; None where there are none."""
        if self.problem_type != "detection":
            return None
        return BoxRules(**msgspec.structs.asdict(self.detection or Detection()))

    @property
    def gate(self) -> GateRules:
        """What the promotion gate goes by."""
        return GateRules(**msgspec.structs.asdict(self.promotion))

    def card(self, dataset_digest: str) -> ModelCard:
        """The card of a model trained on that snapshot, before anything is known of it."""
        image = self.image
        return ModelCard(
            model=self.name,
            problem_type=self.problem_type,
            classes=self.classes,
            width=image.width,
            height=image.height,
            mode=image.mode,
            oversampling=image.oversampling,
            dataset_digest=dataset_digest,
            boxes=self.box_rules,
        )

    @property
    def images_prefix(self) -> str:
        """Where the model's images lie in the images bucket."""
        return f"images/{self.name}/"


class ModelFolder:
    """One folder of model_configs: config.yaml, labeling_template.xml and model.py.

    Both files are read when asked for and checked against each other; each problem is a `ConfigError`.
    """

    def __init__(self, folder: Path) -> None:
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
        label_config = LabelConfig.parse(self.template, problem_types.of(self.config.problem_type).control, where=file)
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

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def find(cls, settings: Settings | None = None) -> ModelConfigs:
        """The folder that the environment names, or the packaged one (a namespace package, in a layer as in a checkout)."""
        given = (settings or Settings()).model_configs
        if given:
            return cls(Path(given))
        package = importlib.util.find_spec("model_configs")
        if package is None or not package.submodule_search_locations:
            raise ConfigError("model_configs", "no such folder; run the command in the repository")
        return cls(Path(next(iter(package.submodule_search_locations))))

    @cached_property
    def names(self) -> list[str]:
        if not self.root.is_dir():
            raise ConfigError(str(self.root), "no such folder")
        names = []
        for entry in sorted(self.root.iterdir()):
            if (entry / "config.yaml").is_file():
                names.append(entry.name)
            elif (entry / "config.yml").is_file():
                raise ConfigError(entry / "config.yml", "is not read under this name; call it config.yaml")
        return names

    @cached_property
    def _folders(self) -> dict[str, ModelFolder]:
        return {name: ModelFolder(self.root / name) for name in self.names}

    def checked(self) -> list[ModelFolder]:
        """All models, each config read and held against its label config. Raises `ConfigError`."""
        for folder in self._folders.values():
            _ = folder.label_config
        return list(self._folders.values())

    def __getitem__(self, model: str) -> ModelFolder:
        try:
            return self._folders[model]
        except KeyError:
            import difflib

            near = difflib.get_close_matches(model, self.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.names) or 'none'}"
            raise UnknownModelError(f"no model {model!r}; {hint}") from None


def parse(text: str, *, where: str) -> ModelConfig:
    """Read a config.yaml. `where` names it in errors. Raises `ConfigError`."""
    config = convert(_plain(text, where), ModelConfig, where=where)
    for key, problem in config.contradictions():
        raise ConfigError(where, problem, key)
    return config


def _plain(text: str, where: str) -> Any:
    """What the YAML says. JSON is YAML too, and read in a hundredth of the time: so configs lie in the functions' layer."""
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except ValueError:
        from labelloop.unique_yaml import read  # PyYAML: 20 ms of a cold start

        return read(text, where=where)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")  # YAML's reader says which
    return found


def config_digest(config: ModelConfig, label_config: LabelConfig) -> str:
    """SHA-256 of all that config.yaml says, be it YAML or JSON, and that functions read of labeling_template.xml."""
    return hashlib.sha256(msgspec.json.encode((config, label_config))).hexdigest()


def schema() -> dict[str, Any]:
    """JSON schema of config.yaml, for editors."""
    return msgspec.json.schema(ModelConfig)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(file), "no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), f"is not UTF-8 text: {error}") from error
