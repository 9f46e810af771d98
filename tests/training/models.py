"""Model folders of each problem type that train in seconds, and the images that they learn from."""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image, ImageDraw

from cli.examples import Example
from labelloop.model_config import ModelConfig, ModelConfigs, parse
from labelloop.records import ProblemTypeName, Region

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}

_CONFIG = """
name: {name}
problem_type: {problem_type}
classes: {classes}
architecture: {{name: {architecture}, weights: {weights}}}
image: {{width: {width}, height: {height}, mode: {mode}}}
hyperparameters: {{epochs: {epochs}, batch_size: {batch_size}, learning_rate: 0.003}}
label_studio: {{title: labelloop {name}}}
retrain: {{at: [10]}}
splits: {{test: 0.3, validation: 0.2}}
"""

_MODELS: dict[ProblemTypeName, str] = {
    "multilabel": """
from torch import nn
from torchvision.transforms import v2


def build_model(config, weights):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, len(config.classes)),
    )


def augmentation(config):
    return v2.RandomHorizontalFlip()
""",
    "detection": """
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.transforms import v2


class Backbone(nn.Sequential):
    out_channels = 32


def build_model(config, weights):
    layers = [layer for i, o, s in ((3, 16, 2), (16, 32, 2), (32, 32, 2))
              for layer in (nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU())]
    classes = len(config.classes) + 1
    return FCOS(
        Backbone(*layers), classes, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)), center_sampling_radius=1.5,
        head=FCOSHead(32, 1, classes, num_convs=1), fixed_size=(config.image.width, config.image.height),
    )


def augmentation(config):
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomAffine(0, translate=(0.3, 0.3))])
""",
}


_TORCHVISION = """
from training_jobs import architectures


def build_model(config, weights):
    return architectures.build(config, weights)


def augmentation(config):
    return architectures.augmentation(config)
"""


def config_text(problem_type: ProblemTypeName, **values: object) -> str:
    """The config.yaml of a model of that type, with other values where given."""
    given = {
        "name": f"tiny_{problem_type}",
        "problem_type": problem_type,
        "classes": list(COLOURS),
        "architecture": "own",
        "weights": "none",
        "width": 64,
        "height": 48,
        "mode": "RGB",
        "epochs": 2,
        "batch_size": 4,
    }
    return _CONFIG.format(**given | values)


def config_of(problem_type: ProblemTypeName, **values: object) -> ModelConfig:
    return parse(config_text(problem_type, **values), where="config.yaml")


def write_folder(root: Path, problem_type: ProblemTypeName, **values: object) -> ModelConfigs:
    """`root` with the one model `tiny_{problem_type}`; no template, which training does not read.

    Its network is one of its own, or torchvision's where an `architecture` is named.
    """
    folder = root / f"tiny_{problem_type}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(problem_type, **values))
    (folder / "model.py").write_text(_TORCHVISION if "architecture" in values else _MODELS[problem_type])
    return ModelConfigs(root)


def rectangles(count: int, problem_type: ProblemTypeName, *, seed: int = 0) -> list[Example]:
    """Coloured rectangles on clouds of grey, at most one of a colour; on some images none. Detection alone knows their places.

    Without the clouds many would look the same, and count as copies of each other.
    """
    chance = random.Random(seed)
    made = []
    for number in range(count):
        width, height = chance.choice([(96, 72), (64, 48), (80, 100)])
        background = Image.frombytes("L", (4, 4), bytes(chance.randrange(90, 150) for _ in range(16)))
        image = background.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
        truth = []
        for label in chance.sample(sorted(COLOURS), chance.choice([0, 1, 1, 2, 2, 3])):
            w, h = round(width * chance.uniform(0.2, 0.4)), round(height * chance.uniform(0.2, 0.4))
            x, y = chance.randrange(width - w), chance.randrange(height - h)
            ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=COLOURS[label])
            box = (x / width, y / height, (x + w) / width, (y + h) / height)
            truth.append(Region(label=label, box=box if problem_type == "detection" else None))
        file = io.BytesIO()
        image.save(file, "PNG")
        made.append(Example(f"image-{number:03}.png", file.getvalue(), truth))
    return made
