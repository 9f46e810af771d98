"""The ML backend: setup, predict and versions, for every model; and the predicting of tasks, which `prelabel` shares.

Setup never loads a model (Label Studio gives it 3 seconds); the champion pointer is read again every few seconds, so that a
promotion or a rollback is served without a deployment. One broken image spoils no other task's prediction.

A request of many tasks (Retrieve Predictions sends all at once) is split over other invocations, and what there was no time for
is queued: API Gateway gives up after 29 seconds, and an answer that comes too late is lost whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from threading import BoundedSemaphore, Condition, Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from labelloop import active_learning, imaging, problem_types
from labelloop.active_learning import Place
from labelloop.artifacts import Bucket, Champions, is_plain_key, parse_s3_uri
from labelloop.errors import (
    ImageError,
    LabelloopError,
    LabelStudioError,
    LateError,
    ModelError,
    RequestError,
    ServiceError,
    StorageError,
    TooLargeError,
)
from labelloop.label_studio.payloads import (
    NotPredicted,
    Prediction,
    PredictRequest,
    PredictResponse,
    PredictTask,
    SetupRequest,
    image_address,
)
from labelloop.model_config import ModelConfigs, ModelFolder, config_digest
from labelloop.records import Champion, ModelCard, Region, version_string

if TYPE_CHECKING:
    from labelloop.inference import Floats, Model
    from labelloop.label_studio.client import LabelStudioClient
    from labelloop.settings import Settings

POINTER_SECONDS = 3.0
FETCH_THREADS = 32  # an image waits for S3, not for a core
MAX_BODY = 6 * 2**20  # bytes; Lambda takes no larger request
MAX_TASKS = 5_000  # of a request
PART = 50  # tasks that are predicted by one invocation; above, a request is split
MAX_ANSWER = 6 * 2**20 - 2**16  # bytes, of the answers as Lambda sends them, in 6 MB with their wrapping
QUEUED = NotPredicted("queued: there was no time or room for its prediction, which is imported afterwards")
_TO_ANSWER = 5.0  # seconds to queue what is late and to answer; a cold start before the function's own time is in them, too
LAST_IMAGE = 2.0  # seconds before that, in which an image that was begun is finished, and a part answers
_USUAL_BYTES = 2 * 2**20  # of an image's file; that many a thread are always there, larger ones wait for room
_ROOM = imaging.MAX_BYTES  # for any file that is read
# As glibc's malloc.h has them: blocks from so many bytes on go back to the system when they are freed, and so does what is
# free at the end of a heap beyond that; so many heaps there are for all threads.
_MALLOC = {"M_MMAP_THRESHOLD": (-3, 8 * 2**20), "M_TRIM_THRESHOLD": (-1, 16 * 2**20), "M_ARENA_MAX": (-8, 2)}
_KEPT = 200 * 2**20  # bytes of model files
_SHOWN = 100  # characters of an address in an error
_LONGEST_KEY = 1024  # bytes, in S3
_SEPARATOR = re.compile(r"[/\\?&=]")


class ModelCache:
    """The most recently used models, by SHA-256, up to a sum of their files' sizes; kept over invocations of a function.

    The one used last stays, whatever its size.
    """

    def __init__(self, capacity: int = _KEPT) -> None:
        self._capacity = capacity
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._lock = Lock()

    def get(self, sha256: str) -> Model | None:
        with self._lock:
            if sha256 in self._models:
                self._models.move_to_end(sha256)
            return self._models.get(sha256)

    def put(self, sha256: str, model: Model) -> None:
        with self._lock:
            self._models[sha256] = model
            self._models.move_to_end(sha256)
            while len(self._models) > 1 and sum(kept.file_size for kept in self._models.values()) > self._capacity:
                self._models.popitem(last=False)


class Predicted(NamedTuple):
    """What a version says of a task: what annotators are shown and its form for Label Studio, how sure it is, its place in the
    queue, and the embedding, float32 `[D]`."""

    regions: list[Region]
    result: list[dict[str, Any]]
    certainty: float
    place: Place
    embedding: Floats


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
        self._label_studio_url = label_studio_url
        self._room = _Room(_ROOM)
        self._cores = BoundedSemaphore(os.process_cpu_count() or 1)
        self._loading, self._models = Lock(), ModelCache()
        _bound_kept_memory()

    @classmethod
    def of(cls, settings: Settings, configs: ModelConfigs, champions: Champions) -> TaskPredictor:
        """With what a function's environment names."""

        def connect() -> LabelStudioClient:
            from labelloop.label_studio.client import connect  # boto3, which a prediction from S3 needs nothing of

            return connect(settings)

        images = Bucket(settings.images_bucket)
        return cls(configs, images, champions, connect, label_studio_url=settings.label_studio_url)

    def predict(
        self, champion: Champion, tasks: Sequence[PredictTask], context: Any = None, *, until: float = math.inf
    ) -> list[Predicted | LabelloopError]:
        """What the version says of each task, or why it says nothing of that one. Raises `ModelError`, `StorageError`.

        A `ServiceError` in a task's place may be another answer next time. `context` is interactive mode's. `until`: on the clock
        `time.monotonic`; tasks whose turn does not come by then are a `LateError`.
        """
        if not tasks:
            return []
        folder = self._configs[champion.model]
        _ = folder.label_config  # read before there are threads: msgspec crashes where two meet a type for the first time
        loading = self._threads.submit(self._load, champion)  # in a cold start images are fetched meanwhile

        def answer(task: PredictTask) -> Predicted | LabelloopError:
            try:
                _be_in_time(until)
                with self._room.loan() as take:
                    data = self._fetch(folder, task, take)
                    onnx = loading.result()
                    with self._cores:
                        _be_in_time(until)
                        return _examine(onnx, folder, task, data, context)
            except LabelloopError as error:
                error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold the image
                return error

        answers = [answer(tasks[0])] if len(tasks) == 1 else list(self._threads.map(answer, tasks))
        loading.result()
        return answers

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
        path = _path_of_upload(address, self._label_studio_url)
        if path is not None:
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

    def _load(self, champion: Champion) -> Model:
        with self._loading:
            model = self._models.get(champion.sha256)
            if model is None:
                with ThreadPoolExecutor(1) as reader:
                    content = reader.submit(self._champions.onnx, champion)
                    from labelloop.inference import Model  # onnxruntime and numpy: setup needs none, and S3 is read meanwhile

                    model = Model(content.result())
                if model.card.model != champion.model:
                    raise ModelError(f"{champion.onnx} is a model of {model.card.model}, not of {champion.model}")
                self._models.put(champion.sha256, model)
        return model


class Part(msgspec.Struct, frozen=True):
    """Tasks of a larger request, for another invocation: what it is sent.

    `champion` is the version that all parts answer with. `until`: seconds since 1970; no image is begun later.
    """

    champion: Champion
    tasks: list[PredictTask]
    until: float


class Elsewhere(Protocol):
    """Where a request's tasks go that this invocation does not predict itself; `fan_out.FanOut`."""

    def predict(self, champion: Champion, tasks: Sequence[PredictTask], *, until: float) -> list[msgspec.Raw | None]:
        """Each task's entry of the answer, in JSON; None where none came. It returns by `until` (`time.monotonic`)."""
        ...

    def queue(self, model: str, tasks: Sequence[int]) -> None:
        """Have the tasks with these ids predicted afterwards. Raises `ServiceError`."""
        ...


class PartPredictor:
    """Answers the invocation that sent a part. `log(message, **fields)` is told of each task without a prediction."""

    def __init__(self, tasks: TaskPredictor, *, log: Callable[..., None]) -> None:
        self._tasks, self._log = tasks, log

    def __call__(self, part: Part) -> list[Prediction | NotPredicted | None]:
        """Each task's entry of the answer; None for what may go well later. Raises `ModelError`, `StorageError`.

        Many parts at once can be too much for who holds the images: a `ServiceError` is no last word here.
        """
        until = time.monotonic() + part.until - time.time()
        return _entries(self._tasks, part.champion, part.tasks, until=until, log=self._log, later=(LateError, ServiceError))


class Predictor:
    """Answers Label Studio. `elsewhere` is called for when it is needed first; it takes a while to get ready.

    `log(message, **fields)` is told of each task without a prediction.
    """

    def __init__(
        self,
        configs: ModelConfigs,
        champions: Champions,
        tasks: TaskPredictor,
        elsewhere: Callable[[], Elsewhere],
        *,
        log: Callable[..., None],
    ) -> None:
        self._configs, self._champions, self._tasks, self._log = configs, champions, tasks, log
        self._elsewhere = elsewhere
        self._pointers: dict[str, tuple[float, Champion | None]] = {}

    def setup(self, model: str, body: bytes) -> dict[str, Any]:
        """Answer of `POST setup`. Raises `RequestError`, `UnknownModelError`."""
        _parse(body, SetupRequest)
        self._configs[model]
        champion = self._champion(model)
        return {"model_version": version_string(model, champion.version if champion else None)}

    def versions(self, model: str) -> dict[str, Any]:
        """Answer of `GET versions`: the version that serves, and by which config it does."""
        serves, folder = self.setup(model, b"{}")["model_version"], self._configs[model]
        return {"versions": [serves], "config": config_digest(folder.config, folder.label_config)}

    def predict(self, model: str, body: bytes, *, seconds: float) -> PredictResponse:
        """Answer of `POST predict`, within so many `seconds`: an entry for each task; one without a prediction says why.

        More than `PART` tasks are predicted elsewhere, all with one version. What is late, or does not fit into the answer, is
        queued; raises `ServiceError` when that cannot be.

        With a context (interactive mode) a detector answers with its best box where the annotator points; the editor wants a
        result there even when there is none to give.
        """
        until = time.monotonic() + seconds - _TO_ANSWER
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
        found: Sequence[Prediction | NotPredicted | msgspec.Raw | None]
        if len(tasks) > PART and not context:
            found = self._elsewhere().predict(champion, tasks, until=until)
        else:
            until = math.inf if context else until - LAST_IMAGE
            found = _entries(self._tasks, champion, tasks, context, until=until, log=self._log)
        return PredictResponse(self._complete(model, tasks, found), version)

    def _complete(
        self, model: str, tasks: Sequence[PredictTask], found: Sequence[Prediction | NotPredicted | msgspec.Raw | None]
    ) -> list[Prediction | NotPredicted | msgspec.Raw]:
        """An entry for each task: where there is none, or no room for it, the task is queued."""
        queued = _size(QUEUED)
        room = MAX_ANSWER - len(found) * queued
        results: list[Prediction | NotPredicted | msgspec.Raw] = []
        late: list[int] = []
        for task, entry in zip(tasks, found, strict=True):
            more = 0 if entry is None else _size(entry) - queued
            if entry is not None and more <= room:
                results.append(entry)
                room -= more
            elif type(task.id) is int:
                results.append(QUEUED)
                late.append(task.id)
            else:
                results.append(NotPredicted("there was no time or room for its prediction, and without an id none is imported"))
        if late:
            self._elsewhere().queue(model, late)
            self._log("queued", late=len(late), tasks=len(tasks))
        return results

    def _champion(self, model: str) -> Champion | None:
        read_at, champion = self._pointers.get(model, (0.0, None))
        # No monotonic clock: it may stand still while Lambda freezes the sandbox.
        if not 0 <= time.time() - read_at < POINTER_SECONDS:
            champion = self._champions.read(model)
            self._pointers[model] = (time.time(), champion)
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
    if regions is None:
        regions = problem_type.chosen(candidates, onnx.card)
    # The tool may name any class, and a version one that is offered no more: an editor would submit it unseen.
    known = [region for region in regions if region.label in onnx.card.classes and region.label in folder.config.classes]
    result = problem_type.result(known, folder.label_config, size)
    certainty = problem_type.certainty(candidates, onnx.card) if len(known) == len(regions) else 0.0  # it cannot say what it sees
    group = task.group or hashlib.sha256(data).hexdigest()
    place = active_learning.place(folder.config, onnx.card, group, certainty, embedding)
    return Predicted(known, result, certainty, place, embedding)


def _entries(
    predictor: TaskPredictor,
    champion: Champion,
    tasks: Sequence[PredictTask],
    context: Any = None,
    *,
    until: float,
    log: Callable[..., None],
    later: tuple[type[LabelloopError], ...] = (LateError,),
) -> list[Prediction | NotPredicted | None]:
    """Each task's entry of an answer; None in place of the errors `later`."""
    version = version_string(champion.model, champion.version)
    entries: list[Prediction | NotPredicted | None] = []
    for task, found in zip(tasks, predictor.predict(champion, tasks, context, until=until), strict=True):
        if isinstance(found, later):
            entries.append(None)
        elif isinstance(found, LabelloopError):
            log("not predicted", task=task.id if isinstance(task.id, int) else None, reason=str(found))
            entries.append(_nothing(str(found), version, context))
        else:
            entries.append(Prediction(result=found.result, score=found.place.score, model_version=version))
    return entries


def _be_in_time(until: float) -> None:
    if time.monotonic() >= until:
        raise LateError("its turn did not come in time")


def _size(entry: Any) -> int:
    """Bytes of an entry in what the function answers: JSON in JSON."""
    return len(msgspec.json.encode(msgspec.json.encode(entry).decode()))


def _nothing(reason: str, version: str, context: Any) -> Prediction | NotPredicted:
    return Prediction(result=[], score=0.0, model_version=version) if context else NotPredicted(reason)


def _path_of_upload(address: str, label_studio_url: str) -> str | None:
    """The path of a file that the Label Studio at `label_studio_url` holds; None of any other address. Raises `ImageError`.

    There is no step outside in it, however often somebody decodes it.
    """
    from urllib.parse import unquote, urlsplit  # a hundredth of a cold start, and images in S3 need none of it

    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ImageError(f"{_shown(address)} is no address: {str(error)[:_SHOWN]}") from error
    ours = parts.scheme in ("http", "https") and parts.netloc == urlsplit(label_studio_url).netloc
    if not ours and (parts.scheme or parts.netloc):
        return None
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    outside = ".." in _SEPARATOR.split(unquote(unquote(path)))
    return path if path.startswith(("/data/upload/", "/data/local-files/")) and not outside else None


def _shown(address: str) -> str:
    return address if len(address) <= _SHOWN else f"{address[: _SHOWN // 2]}…{address[-_SHOWN // 2 :]}"


def _parse[T](body: bytes, kind: type[T]) -> T:
    if len(body) > MAX_BODY:
        raise RequestError(f"the body has {len(body) / 2**20:.1f} MB; at most {MAX_BODY // 2**20} MB are read")
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:  # no JSON, not UTF-8, not of the type; nested too deep
        raise RequestError(f"the body is no {kind.__name__}: {error}") from error
