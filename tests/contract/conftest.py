"""The predict function as it is deployed, on buckets of the emulator, before a Label Studio that holds uploads."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import pytest

from labelloop import artifacts, aws
from labelloop.artifacts import Bucket, Champions, s3_uri
from tests import examples
from tests.recording_server import Answer, RecordingServer, serving


@dataclass
class Parts:
    """Lambda's client and `predict_part` behind it, in this process; the parts that it was sent. `broken`: it dies of each."""

    queue: str
    events: list[dict[str, Any]] = field(default_factory=list)
    broken: bool = False

    def __post_init__(self) -> None:
        self._handler = examples.load_handler("predict_part").handler

    def invoke(self, *, FunctionName: str, Payload: bytes) -> dict[str, Any]:
        event = json.loads(Payload)
        self.events.append(event)
        if self.broken:
            return {"FunctionError": "Unhandled", "Payload": io.BytesIO(b'{"errorMessage": "out of memory"}')}
        return {"Payload": io.BytesIO(json.dumps(self._handler(event, examples.LambdaContext())).encode())}


@dataclass
class Backend:
    """The predict function behind `/{model}/…`, with its two buckets, its Label Studio, and what predicts its parts."""

    handler: ModuleType
    images: Bucket
    artifacts: Bucket
    label_studio: RecordingServer
    parts: Parts

    def queued(self) -> list[int]:
        """The ids of the tasks in the prelabel queue."""
        messages = boto3.client("sqs").receive_message(QueueUrl=self.parts.queue, MaxNumberOfMessages=10).get("Messages", [])
        return sorted(number for message in messages for number in json.loads(str(message.get("Body")))["asked"])

    def ask(self, method: str, route: str, body: Any = None, *, model: str = "digits") -> tuple[int, Any]:
        """Send a request (a body that is no text becomes JSON); the status and the JSON that comes back."""
        text = body if isinstance(body, str | None) else json.dumps(body)
        return self.send(examples.api_event(method, model, route, text))

    def send(self, event: dict[str, Any]) -> tuple[int, Any]:
        answer = self.handler.handler(event, examples.LambdaContext())
        json.dumps(answer)  # API Gateway takes plain JSON
        assert answer["headers"]["Content-Type"] == "application/json"
        assert "Traceback" not in answer["body"]
        return answer["statusCode"], json.loads(answer["body"])

    def setup(self, **body: Any) -> tuple[int, Any]:
        return self.ask("POST", "setup", {"project": "1.2", "schema": examples.TEMPLATE, "hostname": "http://ls", **body})

    def predict(self, *tasks: Any, **body: Any) -> tuple[int, Any]:
        request = {"tasks": list(tasks), "project": "1.2", "label_config": examples.TEMPLATE, "params": {"context": None}}
        return self.ask("POST", "predict", {**request, **body})

    def put_image(self, name: str, data: bytes) -> str:
        """Upload an image of the model; its address."""
        key = f"images/digits/{name}"
        self.images.put(key, data)
        return s3_uri(self.images.name, key)

    def promote(self, version: int, onnx: bytes) -> None:
        """Let a version serve."""
        champions = Champions(self.artifacts)
        self.artifacts.put(artifacts.onnx_key("digits", version), onnx)
        champions.swap(examples.champion(version, onnx), tag=champions.read_tagged("digits")[1])


@pytest.fixture
def empty_backend(new_bucket: Callable[[], Bucket], monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Before the first model."""
    images, artifacts_bucket = new_bucket(), new_bucket()
    secret = f"labelloop/test/{uuid.uuid4().hex}"
    queue = boto3.client("sqs").create_queue(QueueName=f"prelabel-{uuid.uuid4().hex}")["QueueUrl"]
    boto3.client("secretsmanager").create_secret(Name=secret, SecretString=json.dumps({"token": "0123456789abcdef"}))
    with serving(lambda _: Answer(404)) as label_studio:
        for name, value in {
            "LABELLOOP_STAGE": "test",
            "LABELLOOP_IMAGES_BUCKET": images.name,
            "LABELLOOP_ARTIFACTS_BUCKET": artifacts_bucket.name,
            "LABELLOOP_LABEL_STUDIO_URL": label_studio.url,
            "LABELLOOP_LABEL_STUDIO_SECRET": secret,
            "LABELLOOP_PREDICT_PART_FUNCTION": "part",
            "LABELLOOP_PRELABEL_QUEUE": queue,
            "POWERTOOLS_SERVICE_NAME": "predict",
        }.items():
            monkeypatch.setenv(name, value)
        parts, client = Parts(queue), aws.client
        monkeypatch.setattr(aws, "client", lambda service, **limits: parts if service == "lambda" else client(service, **limits))
        yield Backend(examples.load_handler("predict"), images, artifacts_bucket, label_studio, parts)


@pytest.fixture
def backend(empty_backend: Backend) -> Backend:
    """Version 1 serves: `examples.brightness_model`."""
    empty_backend.promote(1, examples.brightness_model())
    return empty_backend


@pytest.fixture
def detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Backend:
    """The predict function with the model `spots`, whose champion finds bright quadrants, beside digits."""
    for name in ("config.yaml", "labeling_template.xml"):
        target = tmp_path / "digits" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((examples.REPOSITORY / "model_configs" / "digits" / name).read_bytes())
    examples.make_model_folder(tmp_path, "spots", "detection", ["spot", "hole"])
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(tmp_path))
    backend: Backend = request.getfixturevalue("empty_backend")
    onnx = examples.quadrant_model("spots", ["spot", "hole"])
    backend.artifacts.put(artifacts.onnx_key("spots", 1), onnx)
    Champions(backend.artifacts).swap(examples.champion(1, onnx, "spots"), tag=None)
    return backend
