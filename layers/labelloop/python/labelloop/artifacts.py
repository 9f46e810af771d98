"""Where things lie in S3, how they are read and written, and the champion pointer.

S3 goes through obstore: an eighth of boto3's CPU per GET and a twentieth of its import time, which the predict function feels.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import obstore
from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError
from obstore.store import S3Store

from labelloop.errors import ConflictError, ModelError, StorageError, TooLargeError
from labelloop.records import Champion, Evaluation
from labelloop.settings import Settings

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import RetryConfig

_MAX_OBJECT_BYTES = 2 * 2**30
_DOWNLOADS = 5  # of an object that is written meanwhile
_PIECE = 16 * 2**20  # bytes that a download holds at once
_PART = 5 * 2**20  # bytes; S3's least for a part of an upload
_CHANGED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
_RETRIES: RetryConfig = {  # each wait is drawn at random; none begins later than `retry_timeout` after the request
    "max_retries": 3,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
    "retry_timeout": timedelta(seconds=30),
}
_PATIENCE_S = 5.0  # that S3 has for a reader who pauses; whoever pauses longer asks again
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# ValueError: a key that it does not take; FileNotFoundError: where it writes there is no such bucket.
_OBSTORE_ERRORS = (obstore.exceptions.BaseError, ValueError, FileNotFoundError)


def manifest_key(model: str, digest: str) -> str:
    return f"snapshots/{model}/{digest}/manifest.jsonl"


def index_key(model: str) -> str:
    return f"indexes/{model}.sqlite"


def training_prefix(model: str) -> str:
    return f"training/{model}/"


def training_archive_key(model: str, job_name: str) -> str:
    return f"{training_prefix(model)}{job_name}/output/model.tar.gz"


def checkpoints_prefix(model: str, job_name: str) -> str:
    return f"checkpoints/{model}/{job_name}/"


def cache_prefix(model: str) -> str:
    """What training jobs keep for the next one. Nothing depends on it."""
    return f"cache/{model}/"


def onnx_key(model: str, version: int) -> str:
    return f"models/{model}/{version}/model.onnx"


def evaluation_key(model: str, version: int) -> str:
    return f"models/{model}/{version}/evaluation.json"


def champion_key(model: str) -> str:
    return f"champions/{model}.json"


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`. Raises `ValueError` when it is none."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket or not key:
        raise ValueError(f"{uri!r} is no s3://bucket/key address")
    return bucket, key


def s3_uri(bucket: str, key: str) -> str:
    """The address of an object. The key stands as it is: S3's own tools and Label Studio decode nothing."""
    return f"s3://{bucket}/{key}"


def is_plain_key(key: str) -> bool:
    """Whether `Bucket` can address a key: no empty, `.` or `..` part, no control character. obstore takes no others."""
    return all(part not in ("", ".", "..") for part in key.split("/")) and not _CONTROL.search(key)


class Entry(NamedTuple):
    """What a listing says of an object. The entity tag of an object written by one PUT, without KMS, is its MD5."""

    size: int  # bytes
    e_tag: str | None
    last_modified: datetime


class Bucket:
    """One S3 bucket. Every method raises `StorageError` when S3 does not do its part, or the key is no plain one."""

    def __init__(self, name: str, *, credential_provider: Any = None) -> None:
        self.name = name
        settings = Settings()
        token = settings.credentials_token
        options: dict[str, Any] = {"container_authorization_token_file": _token_file(token)} if token else {}
        self._store = S3Store(
            name,
            credential_provider=credential_provider,
            retry_config=_RETRIES,
            client_options={"timeout": "20s", "connect_timeout": "3s", "allow_http": bool(settings.endpoint_url)},
            **options,
        )

    def get(self, key: str, *, limit: int | None = None, admit: Callable[[int], None] | None = None) -> bytes | None:
        """The object's content, or None when there is no such object. Raises `TooLargeError` above `limit` bytes.

        `admit` is told the size before the content is read, and may wait until there is room for it.
        """
        found = self.get_tagged(key, limit=limit, admit=admit)
        return found[0] if found else None

    def get_tagged(
        self, key: str, *, limit: int | None = None, admit: Callable[[int], None] | None = None
    ) -> tuple[bytes, str | None] | None:
        """As `get`, with the entity tag."""
        try:
            answer = obstore.get(self._store, key)
            size, tag = answer.meta["size"], answer.meta["e_tag"]
            most = limit or _MAX_OBJECT_BYTES
            if size > most:
                raise TooLargeError(f"s3://{self.name}/{key} has {size:,} bytes; at most {most:,} are read", size)
            if admit is not None:
                asked = time.monotonic()
                admit(size)
                if time.monotonic() - asked > _PATIENCE_S:
                    answer = obstore.get(self._store, key, options={"if_match": tag})
            return bytes(answer.bytes()), tag
        except (NotFoundError, FileNotFoundError):
            return None
        except _OBSTORE_ERRORS as error:
            raise StorageError(f"cannot read s3://{self.name}/{key}: {_first_line(error)}") from error

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None when there is no such object."""
        try:
            return int(obstore.head(self._store, key)["size"])
        except (NotFoundError, FileNotFoundError):
            return None
        except _OBSTORE_ERRORS as error:
            raise StorageError(f"cannot look at s3://{self.name}/{key}: {_first_line(error)}") from error

    def put(self, key: str, data: bytes) -> None:
        try:
            obstore.put(self._store, key, data)
        except _OBSTORE_ERRORS as error:
            raise StorageError(f"cannot write s3://{self.name}/{key}: {_first_line(error)}") from error

    def put_if(self, key: str, data: bytes, *, tag: str | None) -> None:
        """Write only over the version with this entity tag; with None only where nothing lies. Raises `ConflictError`."""
        try:
            if tag is None:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            else:
                obstore.put(self._store, key, data, mode={"e_tag": tag}, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            raise ConflictError(f"s3://{self.name}/{key} was changed by somebody else") from None
        except _OBSTORE_ERRORS as error:
            raise StorageError(f"cannot write s3://{self.name}/{key}: {_first_line(error)}") from error

    def download(self, key: str, file: Path) -> str | None:
        """Write the object's content into a file, piece by piece; its entity tag, or None when there is no such object."""
        for _ in range(_DOWNLOADS - 1):
            try:
                return self._download(key, file)
            except ConflictError:
                continue
        return self._download(key, file)

    def _download(self, key: str, file: Path) -> str | None:
        """As `download`. Raises `ConflictError` when somebody has written it meanwhile."""
        try:
            meta = obstore.head(self._store, key)
            with file.open("wb") as content:
                for start in range(0, meta["size"], _PIECE):
                    piece = (start, min(start + _PIECE, meta["size"]))
                    options: GetOptions = {"range": piece, "if_match": meta["e_tag"]}
                    content.write(obstore.get(self._store, key, options=options).bytes())
            return meta["e_tag"]
        except (NotFoundError, FileNotFoundError):
            return None
        except PreconditionError:
            raise ConflictError(f"s3://{self.name}/{key} changes while it is read") from None
        except _OBSTORE_ERRORS as error:
            raise StorageError(f"cannot read s3://{self.name}/{key}: {_first_line(error)}") from error

    def upload(self, key: str, file: Path) -> None:
        """Write a file's content, piece by piece."""
        try:
            obstore.put(self._store, key, file, chunk_size=_PART, max_concurrency=4)
        except _OBSTORE_ERRORS as error:
            raise StorageError(f"cannot write s3://{self.name}/{key}: {_first_line(error)}") from error

    def upload_if(self, key: str, file: Path, *, tag: str | None) -> None:
        """`put_if` with a file's content. In one PUT, for S3 knows conditions, which obstore would read whole into memory."""
        from botocore.exceptions import BotoCoreError, ClientError  # what serves needs none of it

        from labelloop import aws

        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            with file.open("rb") as content:
                aws.client("s3", read_timeout=60).put_object(Bucket=self.name, Key=key, Body=content, **condition)
        except ClientError as error:
            if error.response["Error"]["Code"] in _CHANGED:
                raise ConflictError(f"s3://{self.name}/{key} was changed by somebody else") from None
            raise StorageError(f"cannot write s3://{self.name}/{key}: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"cannot write s3://{self.name}/{key}: {error}") from error

    def keys(self, prefix: str) -> list[str]:
        return list(self.entries(prefix))

    def entries(self, prefix: str) -> dict[str, Entry]:
        """The objects whose keys start with `prefix`, a folder's name, by key."""
        try:
            return {
                entry["path"]: Entry(entry["size"], entry["e_tag"], entry["last_modified"])
                for chunk in obstore.list(self._store, prefix)
                for entry in chunk
            }
        except _OBSTORE_ERRORS as error:
            raise StorageError(f"cannot list s3://{self.name}/{prefix}: {_first_line(error)}") from error


class Champions:
    """The champion pointers of the artifacts bucket."""

    def __init__(self, artifacts: Bucket) -> None:
        self._artifacts = artifacts

    def read(self, model: str) -> Champion | None:
        return self.read_tagged(model)[0]

    def read_tagged(self, model: str) -> tuple[Champion | None, str | None]:
        """The pointer and the tag that `swap` wants; None and None before the first promotion."""
        found = self._artifacts.get_tagged(champion_key(model))
        if found is None:
            return None, None
        try:
            return msgspec.json.decode(found[0], type=Champion), found[1]
        except ValueError as error:  # no JSON, not UTF-8, or not of the type
            raise ModelError(f"the champion pointer of {model} is damaged: {error}") from error

    def swap(self, champion: Champion, *, tag: str | None) -> None:
        """Let `champion` serve, unless the pointer changed since `tag` was read (`ConflictError`)."""
        self._artifacts.put_if(champion_key(champion.model), msgspec.json.format(msgspec.json.encode(champion)), tag=tag)

    def onnx(self, champion: Champion) -> bytes:
        """The champion's model file, checked against the pointer's SHA-256. Raises `ModelError`."""
        data = self._artifacts.get(champion.onnx)
        if data is None:
            raise ModelError(f"{champion.onnx}, which the champion pointer of {champion.model} names, is missing")
        if hashlib.sha256(data).hexdigest() != champion.sha256:
            raise ModelError(f"{champion.onnx} is not the file that was promoted: its SHA-256 differs")
        return data

    def evaluation(self, model: str, version: int) -> Evaluation | None:
        data = self._artifacts.get(evaluation_key(model, version))
        if data is None:
            return None
        try:
            return msgspec.json.decode(data, type=Evaluation)
        except ValueError as error:
            raise ModelError(f"the evaluation report of {model} version {version} is damaged: {error}") from error


@cache
def _token_file(token: str) -> str:
    """Where obstore reads the token; it knows no variable for it."""
    from tempfile import NamedTemporaryFile  # only where SnapStart starts a function

    with NamedTemporaryFile("w", delete=False) as file:  # which nobody else may read
        file.write(token)
    return file.name


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
