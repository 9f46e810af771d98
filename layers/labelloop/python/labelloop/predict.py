"""The ML backend: setup, predict and versions, for every model; and the predicting of tasks, which `prelabel` shares.

Setup never loads a model (Label Studio gives it 3 seconds); the champion pointer is read again every few seconds, so that a
promotion or a rollback is served without a deployment. One broken image spoils no other task's prediction.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import BoundedSemaphore, Condition, Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import msgspec

from labelloop import active_learning, imaging, problem_types
from labelloop.active_learning import Place
from labelloop.artifacts import Bucket, Champions, is_plain_key, parse_s3_uri
from labelloop.errors import ImageError, LabelloopError, LabelStudioError, ModelError, RequestError, StorageError, TooLargeError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.label_studio.payloads import (
    NotPredicted,
    Prediction,
    PredictRequest,
    PredictResponse,
    PredictTask,
    SetupRequest,
    image_address,
)
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.records import Champion, ModelCard, Region, version_string

if TYPE_CHECKING:
    from labelloop.inference import Model, ModelCache

POINTER_SECONDS = 3.0
FETCH_THREADS = 32  # an image waits for S3, not for a core
MAX_BODY = 6 * 2**20  # bytes; Lambda takes no larger request
MAX_TASKS = 5_000  # of a request; their answers have to fit Lambda's, of 6 MB as well
_USUAL_BYTES = 2 * 2**20  # of an image's file; that many a thread are always there, larger ones wait for room
_ROOM = imaging.MAX_BYTES  # for any file that is read
# As glibc's malloc.h has them: blocks from so many bytes on go back to the system when they are freed, and so does what is
# free at the end of a heap beyond that; so many heaps there are for all threads.
_MALLOC = {"M_MMAP_THRESHOLD": (-3, 8 * 2**20), "M_TRIM_THRESHOLD": (-1, 16 * 2**20), "M_ARENA_MAX": (-8, 2)}
_SHOWN = 100  # characters of an address in an error
_LONGEST_KEY = 1024  # bytes, in S3
_SEPARATOR = re.compile(r"[/\\?&=]")


@dataclass(frozen=True)
class Predicted:
    """What a version says of a task: what annotators are shown and its form for Label Studio, how sure it is, its place."""

    regions: list[Region]
    result: list[dict[str, Any]]
    certainty: float
    place: Place


class TaskPredictor:
    """Predicts tasks with a version: fetches their images, runs the model, says what annotators are shown and when.

    `connect` makes a Label Studio client, needed only for images that Label Studio itself holds.
    """

    def __init__(
        self,
        configs: ModelConfigs,
        images: Bucket,
        champions: Champions,
        connect: Callable[[], LabelStudioClient],
        *,
        label_studio_url: str,
    ) -> None:
        self._configs, self._images, self._champions, self._connect = configs, images, champions, connect
        self._label_studio_host = urlsplit(label_studio_url).netloc
        self._room = _Room(_ROOM)
        self._cores = BoundedSemaphore(os.process_cpu_count() or 1)
        self._loading = Lock()
        _bound_kept_memory()

    def predict(self, champion: Champion, tasks: Sequence[PredictTask], context: Any = None) -> list[Predicted | LabelloopError]:
        """What the version says of each task, or why it says nothing of that one. Raises `ModelError`, `StorageError`.

        A `ServiceError` in a task's place may be another answer next time. `context` is interactive mode's.
        """
        if not tasks:
            return []
        onnx, folder = self._load(champion), self._configs[champion.model]
        _ = folder.label_config  # read before there are threads: msgspec crashes where two meet a type for the first time

        def answer(task: PredictTask) -> Predicted | LabelloopError:
            try:
                with self._room.loan() as take:
                    data = self._fetch(folder, task, take)
                    with self._cores:
                        return _examine(onnx, folder, task, data, context)
            except LabelloopError as error:
                error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold the image
                return error

        if len(tasks) == 1:
            return [answer(tasks[0])]
        return list(self._threads.map(answer, tasks))

    def folder(self, champion: Champion) -> ModelFolder:
        return self._configs[champion.model]

    def card(self, champion: Champion) -> ModelCard:
        return self._load(champion).card

    def _fetch(self, folder: ModelFolder, task: PredictTask, take: Callable[[int], None]) -> bytes:
        """The task's image: from the model's own prefix of the images bucket, or from the stage's Label Studio; nowhere else.

        Label Studio is always asked at its configured address, whatever the scheme in the task's. `take` is told the file's
        size before more than `_USUAL_BYTES` of it are read.
        """
        address = image_address(task.data, folder.label_config.data_key)
        if address.startswith("s3://"):
            return self._fetch_from_bucket(folder.config.images_prefix, address, take)
        try:
            parts = urlsplit(address)
        except ValueError as error:
            raise ImageError(f"{_shown(address)} is no address: {str(error)[:_SHOWN]}") from error
        ours = parts.scheme in ("http", "https") and parts.netloc == self._label_studio_host
        if (ours or not (parts.scheme or parts.netloc)) and _is_upload(parts.path, parts.query):
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            try:
                try:
                    return self._label_studio.download(path, limit=_USUAL_BYTES)
                except TooLargeError as error:
                    take(error.size)
                return self._label_studio.download(path, limit=imaging.MAX_BYTES)
            except LabelStudioError as error:
                missing = error.status is not None and error.status < 500
                kind = ImageError if missing else LabelStudioError
                raise kind(f"{_shown(address)} cannot be fetched: {error}") from error
        raise ImageError(f"{_shown(address)} is neither in the model's images nor an upload of Label Studio")

    def _fetch_from_bucket(self, prefix: str, address: str, take: Callable[[int], None]) -> bytes:
        try:
            bucket, key = parse_s3_uri(address)
        except ValueError as error:
            raise ImageError(f"{_shown(address)} is no s3://bucket/key address") from error
        if bucket != self._images.name or not key.startswith(prefix) or not is_plain_key(key):
            raise ImageError(f"{_shown(address)} lies outside s3://{self._images.name}/{prefix}")
        if len(key.encode()) > _LONGEST_KEY:
            raise ImageError(f"{_shown(address)} does not exist")
        try:
            data = self._images.get(key, limit=imaging.MAX_BYTES, admit=take)
        except StorageError as error:
            raise StorageError(f"{_shown(address)} cannot be fetched: {error}") from error
        if data is None:
            raise ImageError(f"{_shown(address)} does not exist")
        return data

    @cached_property
    def _label_studio(self) -> LabelStudioClient:
        return self._connect()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(FETCH_THREADS)  # kept: making them anew would cost a request milliseconds

    @cached_property
    def _models(self) -> ModelCache:
        from labelloop.inference import ModelCache  # onnxruntime and numpy: not needed to answer setup

        return ModelCache()

    def _load(self, champion: Champion) -> Model:
        from labelloop.inference import Model

        with self._loading:
            model = self._models.get(champion.sha256)
            if model is None:
                model = Model(self._champions.onnx(champion))
                if model.card.model != champion.model:
                    raise ModelError(f"{champion.onnx} is a model of {model.card.model}, not of {champion.model}")
                self._models.put(champion.sha256, model)
        return model


class Predictor:
    """Answers Label Studio. `log(message, **fields)` is told of each task without a prediction."""

    def __init__(self, configs: ModelConfigs, champions: Champions, tasks: TaskPredictor, *, log: Callable[..., None]) -> None:
        self._configs, self._champions, self._tasks, self._log = configs, champions, tasks, log
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
        _ = self._configs[model].label_config  # an unknown model is one before its first version, too
        tasks = request.tasks or []
        if len(tasks) > MAX_TASKS:
            raise RequestError(f"{len(tasks):,} tasks in one request; send at most {MAX_TASKS:,}")
        context = request.params.get("context") if isinstance(request.params, dict) else None
        champion = self._champion(model)
        version = version_string(model, champion.version if champion else None)
        if champion is None:
            return PredictResponse([_nothing("no model has been trained yet", version, context) for _ in tasks], version)
        results: list[Prediction | NotPredicted] = []
        for task, found in zip(tasks, self._tasks.predict(champion, tasks, context), strict=True):
            if isinstance(found, LabelloopError):
                self._log("not predicted", task=task.id if isinstance(task.id, int) else None, reason=str(found))
                results.append(_nothing(str(found), version, context))
            else:
                results.append(Prediction(result=found.result, score=found.place.score, model_version=version))
        return PredictResponse(results, version)

    def _champion(self, model: str) -> Champion | None:
        read_at, champion = self._pointers.get(model, (-POINTER_SECONDS, None))
        if time.monotonic() - read_at >= POINTER_SECONDS:
            champion = self._champions.read(model)
            self._pointers[model] = (time.monotonic(), champion)
        return champion


def _bound_kept_memory() -> None:
    """Have memory for a few photographs kept, and no more; glibc would keep some for each thread.

    With none kept, the system's zeroing of new pages costs a photograph of 4 MB as much as fetching it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # macOS has none
    if mallopt is not None:
        for parameter, value in _MALLOC.values():
            mallopt(parameter, value)


class _Room:
    """Memory for files that are larger than usual."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = Condition()

    @contextmanager
    def loan(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that waits for room for a file of so many bytes, to be called once; it is given back at the end."""
        lent = 0

        def take(size: int) -> None:
            nonlocal lent
            if size <= _USUAL_BYTES:
                return
            needed = min(size, self._size)
            with self._changed:
                self._changed.wait_for(lambda: self._free >= needed)
                self._free -= needed
            lent = needed

        try:
            yield take
        finally:
            if lent:
                with self._changed:
                    self._free += lent
                    self._changed.notify_all()


def _examine(onnx: Model, folder: ModelFolder, task: PredictTask, data: bytes, context: Any) -> Predicted:
    problem_type = problem_types.of(onnx.card.problem_type)
    pixels, size = onnx.decode(data)
    candidates, embedding = onnx.examine(pixels)
    regions = problem_type.prompted(context, candidates) if context else None
    if regions is not None:  # the tool may name any class
        regions = [region for region in regions if region.label in onnx.card.classes]
    else:
        regions = problem_type.chosen(candidates, onnx.card)
    result = problem_type.result(regions, folder.label_config, size)
    certainty = problem_type.certainty(candidates, onnx.card)
    group = task.group or hashlib.sha256(data).hexdigest()
    return Predicted(regions, result, certainty, active_learning.place(folder.config, onnx.card, group, certainty, embedding))


def _nothing(reason: str, version: str, context: Any) -> Prediction | NotPredicted:
    return Prediction(result=[], score=0.0, model_version=version) if context else NotPredicted(reason)


def _is_upload(path: str, query: str) -> bool:
    """Whether a path is a file that Label Studio holds, with no step outside it, however often somebody decodes it."""
    decoded = unquote(unquote(f"{path}?{query}"))
    return path.startswith(("/data/upload/", "/data/local-files/")) and ".." not in _SEPARATOR.split(decoded)


def _shown(address: str) -> str:
    return address if len(address) <= _SHOWN else f"{address[: _SHOWN // 2]}…{address[-_SHOWN // 2 :]}"


def _parse[T](body: bytes, kind: type[T]) -> T:
    if len(body) > MAX_BODY:
        raise RequestError(f"the body has {len(body) / 2**20:.1f} MB; at most {MAX_BODY // 2**20} MB are read")
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:  # no JSON, not UTF-8, not of the type; nested too deep
        raise RequestError(f"the body is no {kind.__name__}: {error}") from error
