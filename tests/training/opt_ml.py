"""Lay out /opt/ml as SageMaker does before a training job starts."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cli.examples import Example
from labelloop.artifacts import s3_uri
from labelloop.dataset import split_of
from labelloop.model_config import ModelConfig, ModelConfigs
from labelloop.records import Evaluation, ManifestRow

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS = REPOSITORY / "model_configs/digits"


def model_configs(folder: Path, *, epochs: int) -> Path:
    """A copy of the digits' config that trains for a few epochs only."""
    shutil.copytree(DIGITS, folder / "digits")
    file = folder / "digits/config.yaml"
    text = file.read_text()
    epochs_line = f"epochs: {ModelConfigs(DIGITS.parent)['digits'].config.hyperparameters.epochs}\n"
    assert epochs_line in text
    file.write_text(text.replace(epochs_line, f"epochs: {epochs}\n"))
    return folder


def manifest_rows(examples: Sequence[Example], config: ModelConfig | None = None) -> list[ManifestRow]:
    """The manifest of annotated images, the digits' unless told otherwise, split as the library splits them."""
    config = config or ModelConfigs(DIGITS.parent)["digits"].config
    return [
        ManifestRow(
            image=s3_uri("images", config.images_prefix + example.name),
            sha256=example.sha256,
            group=example.sha256,
            regions=example.truth,
            split=split_of(example.sha256, config.splits),
            annotation=f"annotation-{number}",
            task=number,
        )
        for number, example in enumerate(sorted(examples, key=lambda example: example.sha256))
    ]


class OptMl:
    """One training job's /opt/ml."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("input/config", "input/data/manifest", "input/data/images"):
            (folder / name).mkdir(parents=True)

    def lay_out(
        self,
        examples: Sequence[Example],
        rows: Sequence[ManifestRow],
        *,
        job_name: str,
        model: str = "digits",
        champion: tuple[int, bytes] | None = None,
        weights: tuple[str, bytes] | None = None,
    ) -> OptMl:
        for example in examples:
            (self.folder / "input/data/images" / example.name).write_bytes(example.image)
        manifest = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        (self.folder / "input/data/manifest/manifest.jsonl").write_bytes(manifest)
        hyperparameters = {
            "model": model,
            "digest": hashlib.sha256(manifest).hexdigest(),
            "n_annotations": str(len(rows)),
            "job_name": job_name,
            "champion_version": str(champion[0]) if champion else "",
            "champion_annotations": "1" if champion else "",
        }
        (self.folder / "input/config/hyperparameters.json").write_bytes(msgspec.json.encode(hyperparameters))
        if champion:
            (self.folder / "input/data/champion").mkdir()
            (self.folder / "input/data/champion/model.onnx").write_bytes(champion[1])
        if weights:
            (self.folder / "input/data/weights").mkdir()
            (self.folder / "input/data/weights" / weights[0]).write_bytes(weights[1])
        return self

    @property
    def onnx(self) -> bytes:
        return (self.folder / "model/model.onnx").read_bytes()

    @property
    def evaluation(self) -> Evaluation:
        return msgspec.json.decode((self.folder / "model/evaluation.json").read_bytes(), type=Evaluation)

    @property
    def failure(self) -> str | None:
        file = self.folder / "output/failure"
        return file.read_text() if file.exists() else None
