"""SageMaker's contract with a training container: what lies where under /opt/ml, how a job ends, and where its time goes.

The container command replaces SageMaker's own toolkit, so hyperparameters, channels and signals are read here.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from labelloop.errors import SettingsError
from labelloop.records import Timing

log = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGTERM  # exit code of a job that was told to stop
_REASON_CHARACTERS = 1024  # of FailureReason, SageMaker's limit


class _Hyperparameters(msgspec.Struct):
    """As they are sent: every value is a string."""

    model: str
    digest: str
    n_annotations: int
    job_name: str
    champion_version: str = ""
    champion_annotations: str = ""


@dataclass(frozen=True)
class TrainingJob:
    """One training job: what it was asked for, and where its files lie."""

    folder: Path
    model: str
    digest: str
    n_annotations: int
    name: str
    champion_version: int | None
    champion_annotations: int | None
    cache: str | None = None  # s3:// address of what earlier jobs kept

    @classmethod
    def read(cls, folder: Path, cache: str | None = None) -> TrainingJob:
        """Read `input/config/hyperparameters.json`. Raises `SettingsError`."""
        file = folder / "input/config/hyperparameters.json"
        try:
            given = msgspec.convert(msgspec.json.decode(file.read_bytes()), _Hyperparameters, strict=False)
            version, annotations = (
                int(value) if value else None for value in (given.champion_version, given.champion_annotations)
            )
        except OSError as error:
            raise SettingsError(f"the hyperparameters cannot be read: {error}") from error
        except (msgspec.MsgspecError, ValueError) as error:
            raise SettingsError(f"{file}: {error}") from error
        return cls(folder, given.model, given.digest, given.n_annotations, given.job_name, version, annotations, cache)

    @property
    def manifest(self) -> Path:
        return self._channel("manifest") / "manifest.jsonl"

    @property
    def images(self) -> Path:
        return self._channel("images")

    @property
    def champion(self) -> Path | None:
        """The reigning champion's ONNX file; None when there is none. Raises `SettingsError` when file and version disagree."""
        file = self._channel("champion") / "model.onnx"
        if file.is_file() != (self.champion_version is not None):
            raise SettingsError(
                f"champion_version is {self.champion_version or 'empty'}, but the champion channel "
                + ("holds a model" if file.is_file() else "holds no model.onnx")
            )
        return file if self.champion_version is not None else None

    def weights(self, uri: str) -> Path:
        """Where the weights channel puts the file that lies at `uri` in S3."""
        return self._channel("weights") / uri.rpartition("/")[2]

    @property
    def onnx(self) -> Path:
        return self._made("model") / "model.onnx"

    @property
    def evaluation(self) -> Path:
        return self._made("model") / "evaluation.json"

    @property
    def checkpoint(self) -> Path:
        """SageMaker copies the folder to S3 while the job runs, and back before it is restarted."""
        return self._made("checkpoints") / "checkpoint.pt"

    def _channel(self, name: str) -> Path:
        return self.folder / "input/data" / name

    def _made(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def report_failure(folder: Path, reason: str) -> None:
    """Leave the reason where SageMaker reads it: it becomes the job's FailureReason.

    The first stays: of several ranks the others fail because one did.
    """
    if len(reason) > _REASON_CHARACTERS:
        reason = reason[: _REASON_CHARACTERS - 1] + "…"
    file = folder / "output/failure"
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), file.open("x", encoding="utf-8") as written:
        written.write(reason)


def exit_when_stopped() -> None:
    """Let SIGTERM end the process with `STOPPED`; the toolkit that would pass it on is not there."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))


@contextmanager
def stop_noted() -> Iterator[threading.Event]:
    """While the block runs, SIGTERM only sets the event, so that the block can put its work away before it leaves."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


class Phases:
    """Seconds by phase, one after the other, and how fast the fit's steps were."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._phase, self._began = "", 0.0
        self._images, self._stepping, self._waited = 0, 0.0, 0.0

    def begin(self, phase: str) -> None:
        """The phase before ends here. One that comes again goes on."""
        self._add_up()
        self._phase, self._began = phase, time.monotonic()

    def steps(self, images: int, seconds: float, waited: float) -> None:
        """Steps of the fit on so many images."""
        self._images += images
        self._stepping += seconds
        self._waited += waited

    def timing(self, decoded: int) -> Timing:
        """Up to now. `decoded`: images that this job had to decode."""
        self.begin(self._phase)
        return Timing(
            seconds={phase: round(seconds, 2) for phase, seconds in self._seconds.items()},
            images_per_second=round(self._images / self._stepping, 1) if self._stepping else None,
            waiting=round(self._waited / self._stepping, 4) if self._stepping else None,
            decoded=decoded,
        )

    def _add_up(self) -> None:
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + time.monotonic() - self._began
