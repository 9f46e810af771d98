"""Small real things for tests to work with: images, an ONNX model, an evaluation report, tasks, Lambda events."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.sax.saxutils import quoteattr

import msgspec
import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from labelloop import problem_types
from labelloop.label_studio.label_config import LabelConfig
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.model_config import ModelConfig, ModelConfigs, ModelFolder
from labelloop.records import (
    BoxRules,
    Champion,
    Comparison,
    Evaluation,
    HoldoutImage,
    Interval,
    Job,
    ModelCard,
    ProblemTypeName,
    Region,
    Scores,
    Snapshot,
    Suspect,
)

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = ModelConfigs(REPOSITORY / "model_configs")
DIGITS: ModelConfig = CONFIGS["digits"].config
LABELS: LabelConfig = CONFIGS["digits"].label_config
TEMPLATE: str = CONFIGS["digits"].template


def grey(digit: int) -> int:
    """The brightness that `brightness_model` takes for a digit."""
    return round(255 * digit / 9)


def png(digit: int = 0, *, size: tuple[int, int] = (24, 24), mode: str = "L", salt: int = 0) -> bytes:
    """A PNG file of one brightness; another `salt` makes another content that looks the same."""
    image = Image.new("L", size, grey(digit))
    image.putpixel((0, 0), (grey(digit) + salt) % 256)
    return encoded(image.convert(mode), "PNG")


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def brightness_model(
    model: str = "digits", *, sharpness: float = 0.01, card: bool = True, classes: Sequence[str] = "0123456789"
) -> bytes:
    """An ONNX file of labelloop's form that tells ten classes by the mean brightness alone, which is the embedding, too."""
    centres = np.array([[grey(digit) for digit in range(10)]], dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
            helper.make_node("Reshape", ["mean", "column"], ["means"]),
            helper.make_node("Sub", ["means", "centres"], ["distance"]),
            helper.make_node("Mul", ["distance", "distance"], ["squared"]),
            helper.make_node("Mul", ["squared", "scale"], ["logits"]),
            helper.make_node("Identity", ["means"], ["embedding"]),
        ],
        "brightness",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 16, 16, 1])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 1]),
        ],
        [
            numpy_helper.from_array(np.array([1, 2, 3], dtype=np.int64), "axes"),
            numpy_helper.from_array(np.array([-1, 1], dtype=np.int64), "column"),
            numpy_helper.from_array(centres, "centres"),
            numpy_helper.from_array(np.array([-sharpness], dtype=np.float32), "scale"),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if card:
        its = msgspec.structs.replace(model_card(model), classes=list(classes))
        helper.set_model_props(made, {"labelloop": msgspec.json.encode(its).decode()})
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def make_model_folder(root: Path, name: str, problem_type: ProblemTypeName, classes: list[str]) -> ModelFolder:
    """A model folder without a network of its own, for what reads only config and template. Files as small as they may be."""
    folder = root / name
    folder.mkdir(parents=True)
    config = {
        "name": name,
        "problem_type": problem_type,
        "classes": classes,
        "architecture": {"name": "own", "weights": "none"},
        "image": {"width": 16, "height": 16, "mode": "L"},
        "hyperparameters": {"epochs": 1, "batch_size": 2, "learning_rate": 0.01},
        "label_studio": {"title": f"labelloop {name}"},
        "retrain": {"at": [10]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    control = problem_types.of(problem_type).control
    template = (
        f'<View><Image name="image" value="$image"/><{control.tag} name="what" toName="image" '
        f'{control.attribute}="{control.allowed[0]}">'
        + "".join(f"<{control.item} value={quoteattr(label)}/>" for label in classes)
        + f"</{control.tag}></View>"
    )
    (folder / "labeling_template.xml").write_text(template)
    return ModelFolder(folder)


def quadrant_model(model: str, classes: list[str]) -> bytes:
    """A detector's ONNX file of 16 × 16 grey pixels: it finds the first class in each quadrant, as likely as it is bright.

    The embedding is the brightness of the four.
    """
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["pixels", "cells"], ["grid"]),
            helper.make_node("ReduceMean", ["grid", "inside"], ["means"], keepdims=0),
            helper.make_node("Reshape", ["means", "column"], ["levels"]),
            helper.make_node("Mul", ["levels", "first"], ["scores"]),
            helper.make_node("Identity", ["quadrants"], ["boxes"]),
            helper.make_node("Reshape", ["means", "row"], ["embedding"]),
        ],
        "quadrants",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 16, 16, 1])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 4, 1, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 4, len(classes)]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 4]),
        ],
        [
            numpy_helper.from_array(np.array([1, 2, 8, 2, 8], dtype=np.int64), "cells"),
            numpy_helper.from_array(np.array([2, 4], dtype=np.int64), "inside"),
            numpy_helper.from_array(np.array([1, 4, 1], dtype=np.int64), "column"),
            numpy_helper.from_array(np.array([1, 4], dtype=np.int64), "row"),
            numpy_helper.from_array(np.eye(1, len(classes), dtype=np.float32)[np.newaxis] / 255, "first"),
            numpy_helper.from_array(
                np.array([[[[x, y, x + 0.5, y + 0.5]] for y in (0, 0.5) for x in (0, 0.5)]], dtype=np.float32), "quadrants"
            ),
        ],
    )
    card = msgspec.structs.replace(
        model_card(model),
        problem_type="detection",
        classes=classes,
        boxes=BoxRules(score_threshold=0.3, iou_threshold=0.5, max_boxes=100),
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(made, {"labelloop": msgspec.json.encode(card).decode()})
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def model_card(model: str = "digits") -> ModelCard:
    return ModelCard(
        model=model,
        problem_type="classification",
        classes=list(DIGITS.classes),
        width=16,
        height=16,
        mode="L",
        oversampling=2.0,
        dataset_digest="0" * 64,
    )


def scores(version: int, accuracy: float) -> Scores:
    return Scores(metric="accuracy", value=accuracy, per_class={}, confusion=[[0] * 10] * 10, version=version)


def comparison(
    challenger: float,
    champion: float,
    *,
    spread: float = 0.01,
    per_class: dict[str, Interval] | None = None,
    classes: list[str] | None = None,
    needed: int | None = None,
) -> Comparison:
    """Of two accuracies on 20 holdout images, with bounds `spread` below and above the difference."""
    return Comparison(
        classes=classes or list(DIGITS.classes),
        images=20,
        challenger=challenger,
        champion=champion,
        difference=interval(challenger - champion, spread),
        per_class=per_class or {"1": interval(challenger - champion, spread)},
        won=max(0, round(20 * (challenger - champion))),
        lost=max(0, round(20 * (champion - challenger))),
        p_value=0.5,
        needed=needed,
    )


def interval(value: float, spread: float) -> Interval:
    return Interval(value=value, low=value - spread, high=value + spread)


def evaluation(
    version: int = 1,
    accuracy: float = 0.9,
    *,
    champion: Scores | None = None,
    compared: Comparison | None = None,
    model: str = "digits",
    job_name: str = "labelloop-local-digits-abc-1",
    onnx_file: bytes = b"onnx",
    run_id: str = "run",
) -> Evaluation:
    """A report on 20 holdout images; unless `compared` says otherwise, they tell two accuracies apart to the point."""
    return Evaluation(
        model=model,
        problem_type="classification",
        job_name=job_name,
        run_id=run_id,
        dataset_digest="d" * 64,
        n_annotations=100,
        n_train=70,
        n_validation=10,
        classes=list(DIGITS.classes),
        challenger=scores(version, accuracy),
        champion=champion,
        holdout=[
            HoldoutImage(sha256=f"{i:064x}", truth=[Region(label="1")], challenger=[Region(label="1", score=0.9)])
            for i in range(20)
        ],
        onnx_sha256=sha256(onnx_file),
        parity=1e-6,
        gate=DIGITS.gate,
        comparison=compared or (comparison(accuracy, champion.value) if champion else None),
        calibration_error=0.02,
        labels_saved=None,
        accept_from=None,
        suspects=[],
        champion_annotations=50 if champion else None,
    )


def suspect(given: str = "1", suggested: str = "7", quality: float = 0.05) -> Suspect:
    return Suspect(
        task=7,
        annotation="annotation-7",
        sha256="7" * 64,
        quality=quality,
        given=[Region(label=given)],
        suggested=[Region(label=suggested, score=0.9)],
    )


def model_archive(report: Evaluation | bytes, onnx_file: bytes = b"onnx", *, prefix: str = "") -> bytes:
    """What SageMaker packs from /opt/ml/model."""
    file = io.BytesIO()
    content = report if isinstance(report, bytes) else msgspec.json.encode(report)
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in (("model.onnx", onnx_file), ("evaluation.json", content)):
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def champion(version: int = 1, onnx_file: bytes = b"onnx", model: str = "digits") -> Champion:
    return Champion(
        model=model,
        version=version,
        onnx=f"models/{model}/{version}/model.onnx",
        sha256=sha256(onnx_file),
        metric="accuracy",
        value=0.9,
        n_annotations=100,
        promoted_at="2026-01-01T00:00:00.000+00:00",
    )


def snapshot(n_annotations: int = 100, digest: str = "d" * 64, model: str = "digits") -> Snapshot:
    return Snapshot(
        model=model,
        digest=digest,
        manifest=f"s3://artifacts/snapshots/{model}/{digest}/manifest.jsonl",
        n_annotations=n_annotations,
        n_train=n_annotations,
        n_validation=0,
        n_test=0,
    )


def job(name: str = "labelloop-local-digits-dddddddddddd-1", n_annotations: int = 100, digest: str = "d" * 64) -> Job:
    return Job(
        job_name=name,
        digest=digest,
        n_annotations=n_annotations,
        attempt=1,
        started_at="2026-01-01T00:00:00.000+00:00",
        snapshot=snapshot(n_annotations, digest),
        champion_version=None,
    )


def annotated_task(
    number: int,
    label: str | list[str] | None = "1",
    *,
    content: str | None = None,
    image: str | None = None,
    updated_at: str = "2026-01-01T00:00:00.000000Z",
    unique_id: str | None = None,
    was_cancelled: bool = False,
    meta: dict[str, Any] | None = None,
) -> AnnotatedTask:
    """A task as Label Studio exports it, with one annotation; `content` stands for the image's bytes."""
    content = str(number) if content is None else content
    choices = [label] if isinstance(label, str) else label
    result = [{"from_name": "digit", "to_name": "image", "type": "choices", "value": {"choices": choices}}] if choices else []
    exported = {
        "id": number,
        "data": {"image": image or f"s3://images/images/digits/{content}.png"},
        "meta": {"sha256": sha256(content)} if meta is None else meta,
        "annotations": [
            {
                "id": number,
                "unique_id": unique_id or f"annotation-{number}",
                "result": result,
                "was_cancelled": was_cancelled,
                "updated_at": updated_at,
            }
        ],
    }
    return msgspec.json.decode(json.dumps(exported), type=AnnotatedTask)


@dataclass
class LambdaContext:
    """What Powertools asks of a Lambda's context."""

    function_name: str = "test"
    function_version: str = "1"
    memory_limit_in_mb: int = 512
    invoked_function_arn: str = "arn:aws:lambda:us-east-1:000000000000:function:test"
    aws_request_id: str = "11111111-2222-3333-4444-555555555555"
    log_group_name: str = "test"
    log_stream_name: str = "test"

    def get_remaining_time_in_millis(self) -> int:
        return 30_000


def load_handler(function: str) -> ModuleType:
    """A fresh copy of `functions/{function}/handler.py`, loaded as Lambda does: from its file, as a module of its own."""
    file = REPOSITORY / "functions" / function / "handler.py"
    spec = importlib.util.spec_from_file_location(f"{function}_handler", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def basic(user: str, password: str) -> str:
    """The Authorization header of Basic credentials."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def api_event(method: str, model: str, route: str, body: str | None) -> dict[str, Any]:
    """A REST API's proxy event."""
    return {
        "resource": f"/{{model}}/{route}",
        "path": f"/{model}/{route}",
        "httpMethod": method,
        "headers": {"Content-Type": "application/json", "User-Agent": "heartex/1.23.2"},
        "multiValueHeaders": {},
        "queryStringParameters": None,
        "pathParameters": {"model": model},
        "stageVariables": None,
        "requestContext": {"resourcePath": f"/{{model}}/{route}", "httpMethod": method, "stage": "v1", "requestId": "r"},
        "body": body,
        "isBase64Encoded": False,
    }


def sqs_event(*bodies: Any) -> dict[str, Any]:
    """An event of an SQS queue with one record a body; message ids are `m0`, `m1`, …"""
    records = [
        {
            "messageId": f"m{number}",
            "receiptHandle": "r",
            "body": body if isinstance(body, str) else json.dumps(body),
            "attributes": {"ApproximateReceiveCount": "1"},
            "messageAttributes": {},
            "md5OfBody": "",
            "eventSource": "aws:sqs",
            "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:queue",
            "awsRegion": "us-east-1",
        }
        for number, body in enumerate(bodies)
    ]
    return {"Records": records}
