"""The ML backend: setup, predict and versions, for every model.

Setup never loads a model (Label Studio gives it 3 seconds); the champion pointer is read again every few seconds, so that a
promotion or a rollback is served without a deployment. One broken image spoils no other task's prediction.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import msgspec

from labelloop import imaging, problem_types
from labelloop.artifacts import Bucket, Champions, is_plain_key, parse_s3_uri
from labelloop.errors import ImageError, LabelloopError, LabelStudioError, ModelError, RequestError, StorageError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.label_studio.label_config import LabelConfig
from labelloop.label_studio.payloads import (
    NotPredicted,
    Prediction,
    PredictRequest,
    PredictResponse,
    PredictTask,
    SetupRequest,
    image_address,
)
from labelloop.model_config import ModelConfigs
from labelloop.records import Champion, version_string

if TYPE_CHECKING:
    from labelloop.inference import Model, ModelCache

POINTER_SECONDS = 3.0
FETCH_THREADS = 32  # an image waits for S3, not for a core


class Predictor:
    """Answers Label Studio. `connect` makes its client, needed only for images that Label Studio itself holds.

    `log(message, **fields)` is told of each task without a prediction.
    """

    def __init__(
        self,
        configs: ModelConfigs,
        images: Bucket,
        champions: Champions,
        connect: Callable[[], LabelStudioClient],
        *,
        label_studio_url: str,
        log: Callable[..., None],
    ) -> None:
        self._configs, self._images, self._champions, self._connect = configs, images, champions, connect
        self._label_studio_host = urlsplit(label_studio_url).netloc
        self._log = log
        self._pointers: dict[str, tuple[float, Champion | None]] = {}

    def setup(self, model: str, body: bytes) -> dict[str, Any]:
        """Answer of `POST setup`. Raises `RequestError`, `UnknownModelError`."""
        _parse(body, SetupRequest)
        self._configs[model]
        champion = self._champion(model)
        return {"model_version": version_string(model, champion.version if champion else None)}

    def versions(self, model: str) -> dict[str, Any]:
        """Answer of `GET versions`: the version that serves."""
        return {"versions": [self.setup(model, b"{}")["model_version"]]}

    def predict(self, model: str, body: bytes) -> PredictResponse:
        """Answer of `POST predict`: an entry for each task; a task that cannot be predicted says why in its own.

        With a context (interactive mode) a detector answers with its best box where the annotator points; the editor wants a
        result there even when there is none to give.
        """
        request = _parse(body, PredictRequest)
        label_config = self._configs[model].label_config
        tasks = request.tasks or []
        context = request.params.get("context") if isinstance(request.params, dict) else None
        champion = self._champion(model)
        version = version_string(model, champion.version if champion else None)
        if champion is None or not tasks:
            return PredictResponse([_nothing("no model has been trained yet", version, context) for _ in tasks], version)
        onnx = self._load(champion)
        with ThreadPoolExecutor(min(FETCH_THREADS, len(tasks))) as pool:
            fetched = [pool.submit(self._fetch, model, task, label_config) for task in tasks]
            with ThreadPoolExecutor(os.cpu_count() or 1) as cores:
                results = [
                    cores.submit(self._predict, onnx, version, label_config, context, task, image.result)
                    for task, image in zip(tasks, fetched, strict=True)
                ]
                return PredictResponse([result.result() for result in results], version)

    def _predict(
        self,
        onnx: Model,
        version: str,
        label_config: LabelConfig,
        context: Any,
        task: PredictTask,
        image: Callable[[], bytes],
    ) -> Prediction | NotPredicted:
        problem_type = problem_types.of(onnx.card.problem_type)
        try:
            data = image()
            candidates = onnx.candidates(onnx.pixels(data))
            regions = problem_type.prompted(context, candidates) if context else None
            if regions is None:
                regions = problem_type.chosen(candidates, onnx.card)
            result = problem_type.result(regions, label_config, imaging.upright_size(data))
        except LabelloopError as error:
            self._log("not predicted", task=task.id, reason=str(error))
            return _nothing(str(error), version, context)
        return Prediction(result=result, score=problem_type.certainty(candidates, onnx.card), model_version=version)

    def _fetch(self, model: str, task: PredictTask, label_config: LabelConfig) -> bytes:
        """The task's image: from the model's own prefix of the images bucket, or from the stage's Label Studio; nowhere else."""
        address = image_address(task.data, label_config.data_key)
        if address.startswith("s3://"):
            return self._fetch_from_bucket(model, address)
        try:
            parts = urlsplit(address)
        except ValueError as error:
            raise ImageError(f"{address!r} is no address: {error}") from error
        ours = parts.scheme in ("http", "https") and parts.netloc == self._label_studio_host
        if (ours or not (parts.scheme or parts.netloc)) and _is_upload(parts.path):
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            try:
                return self._label_studio.download(path, limit=imaging.MAX_BYTES)
            except LabelStudioError as error:
                raise ImageError(f"{address} cannot be fetched: {error}") from error
        raise ImageError(f"{address} is neither in the model's images nor an upload of Label Studio")

    def _fetch_from_bucket(self, model: str, address: str) -> bytes:
        try:
            bucket, key = parse_s3_uri(address)
        except ValueError as error:
            raise ImageError(str(error)) from error
        prefix = self._configs[model].config.images_prefix
        if bucket != self._images.name or not key.startswith(prefix) or not is_plain_key(key):
            raise ImageError(f"{address} lies outside s3://{self._images.name}/{prefix}")
        try:
            data = self._images.get(key)
        except StorageError as error:
            raise ImageError(f"{address} cannot be fetched: {error}") from error
        if data is None:
            raise ImageError(f"{address} does not exist")
        return data

    @cached_property
    def _label_studio(self) -> LabelStudioClient:
        return self._connect()

    @cached_property
    def _models(self) -> ModelCache:
        from labelloop.inference import ModelCache  # onnxruntime and numpy: not needed to answer setup

        return ModelCache()

    def _champion(self, model: str) -> Champion | None:
        read_at, champion = self._pointers.get(model, (-POINTER_SECONDS, None))
        if time.monotonic() - read_at >= POINTER_SECONDS:
            champion = self._champions.read(model)
            self._pointers[model] = (time.monotonic(), champion)
        return champion

    def _load(self, champion: Champion) -> Model:
        from labelloop.inference import Model

        model = self._models.get(champion.sha256)
        if model is None:
            model = Model(self._champions.onnx(champion))
            if model.card.model != champion.model:
                raise ModelError(f"{champion.onnx} is a model of {model.card.model}, not of {champion.model}")
            self._models.put(champion.sha256, model)
        return model


def _nothing(reason: str, version: str, context: Any) -> Prediction | NotPredicted:
    return Prediction(result=[], score=0.0, model_version=version) if context else NotPredicted(reason)


def _is_upload(path: str) -> bool:
    """Whether a path is a file that Label Studio holds, with no step outside it."""
    return path.startswith(("/data/upload/", "/data/local-files/")) and ".." not in unquote(path).split("/")


def _parse[T](body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:  # no JSON, not UTF-8, not of the type; nested too deep
        raise RequestError(f"the body is no {kind.__name__}: {error}") from error
