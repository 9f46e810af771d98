"""The index of a model's annotated tasks, out of which snapshots are frozen: reading what is new costs what is new.

A SQLite file that lies in the artifacts bucket between snapshots. It holds, for each annotated task, the encoded row of the
manifest or the reason why there is none. Tasks lie together in blocks of so many ids, their rows as they stand in a manifest,
which is read and written block by block: nothing is sorted, and memory stays flat, but for four bytes a task, and some hundred
of each image that has copies.

It is a cache. Any index is whole in itself and says how far it has read, so an older one only reads more. What is damaged, of
another format, or made with another configuration is built anew.
"""

from __future__ import annotations

import hashlib
import io
import sqlite3
import time
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, get_args

import msgspec

from labelloop import artifacts
from labelloop.acceptance import NONE_SEEN, Acceptance, acceptance
from labelloop.artifacts import Bucket
from labelloop.dataset import row_of
from labelloop.errors import ConflictError, LabelloopError, LateError, StorageError
from labelloop.label_studio.client import LabelStudioClient, Tally
from labelloop.label_studio.label_config import LabelConfig
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.model_config import ModelConfig, ModelFolder, config_digest
from labelloop.records import ManifestRow, Snapshot, Split
from labelloop.wording import counted

FORMAT = 5  # of the file, and of what rows are made of: raise it with either (tests/unit/test_snapshot_index.py holds an example)

# Label Studio's clocks and transactions are not in one order: what was committed that long after its time is still read.
OVERLAP = timedelta(seconds=30)
_ROUNDS = 5  # of reading what changes while it is read
_REST_SECONDS = 3600  # between two readings of all that take several looks: else constant deletions would have them never end
_CACHE_KB = 1_024  # blocks are read once, and what a small cache holds the processor's holds too
_PAGE = 32_768
_BLOCK = 200  # ids of tasks, as many as an answer of Label Studio's has
_COPY = "another task shows the same image"
_PARTS = 64  # of the checksums, each small enough to be compared at once
_TABLES = """
CREATE TABLE blocks (
  number INTEGER PRIMARY KEY,
  entries BLOB NOT NULL,         -- JSON, by task
  lines BLOB NOT NULL            -- of the manifest, by task
);
CREATE TABLE figures (           -- of each block: all that is read of those in which nothing has changed, lines aside
  block INTEGER PRIMARY KEY,
  tasks INTEGER NOT NULL,
  annotations INTEGER NOT NULL,  -- of these, without skips
  places BLOB NOT NULL,          -- JSON: how many tasks are in which split, or have no row for which reason
  contents BLOB NOT NULL         -- checksums of their images' hashes, 32 bits each: copies have the same
);
CREATE TABLE progress (
  project INTEGER NOT NULL,
  config TEXT NOT NULL,  -- digest of what rows depend on
  since TEXT,            -- what changed up to then has been read; NULL before the first reading has ended
  begun TEXT,            -- what `since` becomes when the reading under way ends
  after INTEGER NOT NULL DEFAULT 0, -- the task that it has come to
  ended REAL NOT NULL DEFAULT 0  -- when a reading of all that took several looks ended, in Unix time
);
"""
_ENCODER = msgspec.json.Encoder()


class _Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An annotated task, its row aside."""

    task: int
    annotations: int
    place: str
    content: int | None = None  # the checksum of its image's hash; None: it has no row
    changed: str = ""  # when the annotation that counts was


class SnapshotIndex:
    """The annotated tasks of one project as rows of one model's manifests, in `file`."""

    def __init__(self, config: ModelConfig, label_config: LabelConfig, project: int, file: Path | str) -> None:
        self._config, self._label_config, self._project = config, label_config, project
        self.acceptance = NONE_SEEN  # of what this object has read that was new
        self._database = sqlite3.connect(file, isolation_level=None)
        # A file that is half-written after a crash is nobody's: it lies in a folder that goes.
        self._database.executescript(
            f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA locking_mode=EXCLUSIVE; "
            f"PRAGMA page_size={_PAGE}; PRAGMA cache_size=-{_CACHE_KB};"
        )

    def close(self) -> None:
        self._database.close()

    @property
    def is_usable(self) -> bool:
        """Whether the file is an index of this project, in this format and with this configuration."""
        if self._database.execute("PRAGMA user_version").fetchone() != (FORMAT,):
            return False
        made_with = config_digest(self._config, self._label_config)
        return bool(self._database.execute("SELECT project, config FROM progress").fetchone() == (self._project, made_with))

    def clear(self) -> None:
        """Make it an empty index."""
        self._database.executescript(
            f"DROP TABLE IF EXISTS blocks; DROP TABLE IF EXISTS figures; DROP TABLE IF EXISTS progress; {_TABLES}"
        )
        made_with = config_digest(self._config, self._label_config)
        self._database.execute("INSERT INTO progress (project, config) VALUES (?, ?)", (self._project, made_with))
        self._database.execute(f"PRAGMA user_version={FORMAT}")

    # Reading

    def catch_up(self, label_studio: LabelStudioClient, *, seconds: float, log: Callable[..., None]) -> bool:
        """Read what has changed in Label Studio, or everything where the counts say that the index is not what is there.

        Whether it is now: an index that took several looks is not built anew within the hour, though tasks may have gone. Raises
        `LabelStudioError`, and `LateError` when it is not done after `seconds`: the next call goes on where it stopped.
        """
        until = time.monotonic() + seconds
        since, begun, _ = self._progress
        begins_anew, goes_on, before = since is None, since is None and begun is not None, None
        for number in range(1, 2 * _ROUNDS + 1):
            there = label_studio.tally(self._project)
            self._read(label_studio, there, until)
            if goes_on:
                self._database.execute("UPDATE progress SET ended = ?", (time.time(),))
                goes_on = False
            if self._holds(there):
                return True
            if there != before and number % _ROUNDS:  # somebody annotates meanwhile
                before = there
                continue
            if begins_anew or self._was_built_just_now:
                break
            log("index built anew", model=self._config.name, reason="the counts differ", index=self._counts, there=there)
            self.clear()
            begins_anew, before = True, None
        log("counts differ, the index is taken as it is", model=self._config.name, index=self._counts, there=there)
        return False

    def _read(self, label_studio: LabelStudioClient, there: Tally, until: float) -> None:
        since, begun, after = self._progress
        if begun is None:
            begun = there.changed_at or ""
            self._database.execute("UPDATE progress SET begun = ?", (begun,))
        changed_after = datetime.fromisoformat(since) - OVERLAP if since else None
        for page in label_studio.annotated_tasks(self._project, since=changed_after, after=after):
            self._database.execute("BEGIN")
            new = self.put(page)
            self._database.execute("UPDATE progress SET after = ?", (page[-1].id,))
            self._database.execute("COMMIT")
            if since is not None:  # what is read anew when an index is built has been counted before
                self._count_accepted(new)
            if time.monotonic() > until:
                read = (
                    f"{self._counts[0]:,} of {counted(there.tasks, 'annotated task')}"
                    if since is None
                    else "a part of what is new"
                )
                raise LateError(f"{read} read, the next look goes on")
        self._database.execute("UPDATE progress SET since = ?, begun = NULL, after = 0", (begun or None,))

    def _count_accepted(self, tasks: list[AnnotatedTask]) -> None:
        found = acceptance(tasks, self._config, self._label_config).values()
        shown, kept = (sum(getattr(one, name) for one in (self.acceptance, *found)) for name in ("shown", "kept"))
        self.acceptance = Acceptance(shown=shown, kept=kept)

    def put(self, tasks: Iterable[AnnotatedTask]) -> list[AnnotatedTask]:
        """Take in tasks as they are now; one without annotations goes. Those of which the index knew something else."""
        blocks: defaultdict[int, list[AnnotatedTask]] = defaultdict(list)
        for task in tasks:
            blocks[task.id // _BLOCK].append(task)
        return [task for number, some in blocks.items() for task in self._put_into_block(number, some)]

    def _put_into_block(self, number: int, tasks: list[AnnotatedTask]) -> list[AnnotatedTask]:
        entries, lines = self._block(number)
        before = dict(entries)
        rows: dict[int, ManifestRow | msgspec.Raw] = dict(lines)
        for task in tasks:
            annotation = task.latest
            if annotation is None:
                entries.pop(task.id, None)
                rows.pop(task.id, None)
                continue
            count = 1 if len(task.annotations) == 1 else len(task.counting)
            row = row_of(task, annotation, self._config, self._label_config)
            if isinstance(row, str):
                entries[task.id] = _Entry(task.id, count, row)
                rows.pop(task.id, None)
                continue
            entries[task.id] = _Entry(task.id, count, row.split, zlib.crc32(row.sha256.encode()), annotation.updated_at)
            rows[task.id] = row
        by_task = [entries[task] for task in sorted(entries)]
        annotations = sum([entry.annotations for entry in by_task])
        places = _ENCODER.encode(Counter([entry.place for entry in by_task]))
        contents = array("I", [entry.content for entry in by_task if entry.content is not None]).tobytes()
        together = _ENCODER.encode_lines([rows[task] for task in sorted(rows)])
        self._database.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", (number, _ENCODER.encode(by_task), together))
        figures = number, len(by_task), annotations, places, contents
        self._database.execute("INSERT OR REPLACE INTO figures VALUES (?, ?, ?, ?, ?)", figures)
        return [task for task in tasks if entries.get(task.id) != before.get(task.id)]

    def _block(self, number: int) -> tuple[dict[int, _Entry], dict[int, msgspec.Raw]]:
        """What there is of a block's tasks, and of the manifest's lines; both by task, in this order."""
        found = self._database.execute("SELECT entries, lines FROM blocks WHERE number = ?", (number,)).fetchone()
        if found is None:
            return {}, {}
        entries = {entry.task: entry for entry in msgspec.json.decode(found[0], type=list[_Entry])}
        with_rows = [task for task, entry in entries.items() if entry.content is not None]
        return entries, dict(zip(with_rows, map(msgspec.Raw, found[1].splitlines()), strict=True))

    @property
    def _progress(self) -> tuple[str | None, str | None, int]:
        return self._database.execute("SELECT since, begun, after FROM progress").fetchone()  # type: ignore[no-any-return]

    @property
    def _was_built_just_now(self) -> bool:
        (ended,) = self._database.execute("SELECT ended FROM progress").fetchone()
        return bool(time.time() - ended < _REST_SECONDS)

    @property
    def _counts(self) -> tuple[int, int]:
        """Tasks and annotations, as `Tally` has them."""
        return self._database.execute("SELECT coalesce(sum(tasks), 0), coalesce(sum(annotations), 0) FROM figures").fetchone()  # type: ignore[no-any-return]

    def _holds(self, there: Tally) -> bool:
        return self._counts == (there.tasks, there.annotations)

    # Freezing

    def freeze(self, manifest: BinaryIO, uri_of: str) -> Snapshot:
        """Write the manifest, JSON lines ordered by task; `uri_of` is its address with `{digest}` in it.

        One row an image: of several tasks with the same content the one annotated last counts, a person's before the model's.
        """
        copies = self._copies()
        places = Counter[str]()
        for (found,) in self._database.execute("SELECT places FROM figures"):
            places.update(msgspec.json.decode(found, type=dict[str, int]))
        splits = Counter[str]({split: places.pop(split, 0) for split in get_args(Split)})
        splits.subtract(copies.values())
        skipped = dict(sorted(places.items())) | ({_COPY: len(copies)} if copies else {})
        digest, spoilt = hashlib.sha256(), {task // _BLOCK for task in copies}
        for number, lines in self._database.execute("SELECT number, lines FROM blocks ORDER BY number"):
            if number in spoilt:
                lines = _ENCODER.encode_lines([line for task, line in self._block(number)[1].items() if task not in copies])
            digest.update(lines)
            manifest.write(lines)
        return Snapshot(
            model=self._config.name,
            digest=digest.hexdigest(),
            manifest=uri_of.format(digest=digest.hexdigest()),
            n_annotations=splits.total(),
            n_train=splits["train"],
            n_validation=splits["validation"],
            n_test=splits["test"],
            skipped=skipped,
        )

    def _copies(self) -> dict[int, Split]:
        """The tasks that do not count, as another one shows the same image, and their splits.

        A person's annotation counts before the model's, then the one changed last; the id decides between equals.
        """
        perhaps = self._repeated_contents()
        copies: dict[int, Split] = {}
        best: dict[str, tuple[tuple[bool, str, str], int, Split]] = {}  # by content hash
        for number, contents in self._database.execute("SELECT block, contents FROM figures ORDER BY block"):
            if perhaps.isdisjoint(array("I", contents)):
                continue
            entries, lines = self._block(number)
            for task, line in lines.items():
                if entries[task].content not in perhaps:
                    continue
                row = msgspec.json.decode(line, type=ManifestRow)
                this = (not row.by_model, entries[task].changed, row.annotation), task, row.split
                other = best.get(row.sha256)
                if other is None or this[0] > other[0]:
                    best[row.sha256], other = this, other
                else:
                    other = this
                if other is not None:
                    copies[other[1]] = other[2]
        return copies

    def _repeated_contents(self) -> set[int]:
        """The checksums that several tasks have."""
        parts = [array("I") for _ in range(_PARTS)]
        for (contents,) in self._database.execute("SELECT contents FROM figures"):
            for content in array("I", contents):
                parts[content % _PARTS].append(content)
        several = [part for part in parts if len(set(part)) < len(part)]
        return {content for part in several for content, count in Counter(part).items() if count > 1}


def freeze(
    tasks: Iterable[AnnotatedTask], config: ModelConfig, label_config: LabelConfig, uri_of: str = ""
) -> tuple[Snapshot, bytes]:
    """The snapshot of these very tasks and its manifest, in memory."""
    with closing(SnapshotIndex(config, label_config, 0, ":memory:")) as index:
        index.clear()
        index.put(tasks)
        manifest = io.BytesIO()
        return index.freeze(manifest, uri_of), manifest.getvalue()


@contextmanager
def opened(
    bucket: Bucket, folder: ModelFolder, project: int, scratch: Path, *, log: Callable[..., None]
) -> Iterator[SnapshotIndex]:
    """A model's index from the artifacts bucket, or an empty one where that is of no use; `scratch` is a folder for its file.

    It is written back at the end, also after an error of ours, unless somebody else has written meanwhile: theirs is as good,
    and where it is an erasure's empty one, ours would bring the image back. Raises `StorageError`.
    """
    key, file = artifacts.index_key(folder.config.name), scratch / "index.sqlite"
    tag = bucket.download(key, file)
    index = None
    try:
        why = "there is none" if tag is None else _unsealed(file)
        index, why = (None, why) if why else _usable(folder, project, file)
        if index is None:
            log("index built anew", model=folder.config.name, reason=why)
            file.unlink(missing_ok=True)
            index = SnapshotIndex(folder.config, folder.label_config, project, file)
            index.clear()
        try:
            yield index
        except LabelloopError:
            _keep(bucket, key, index, file, tag, log)
            raise
        _keep(bucket, key, index, file, tag, log)
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"the index of {folder.config.name} cannot be kept in {scratch}: {error}") from error
    finally:
        if index is not None:
            index.close()


def _usable(folder: ModelFolder, project: int, file: Path) -> tuple[SnapshotIndex | None, str]:
    index = SnapshotIndex(folder.config, folder.label_config, project, file)
    try:
        if index.is_usable:
            return index, ""
        why = "it is of another format, configuration or project"
    except sqlite3.Error as error:
        why = f"it cannot be read: {error}"
    index.close()
    return None, why


def _keep(bucket: Bucket, key: str, index: SnapshotIndex, file: Path, tag: str | None, log: Callable[..., None]) -> None:
    index.close()
    with file.open("ab") as end:
        end.write(_digest(file))
    try:
        bucket.upload_if(key, file, tag=tag)
    except ConflictError as error:
        log("index not kept", reason=str(error))


def _unsealed(file: Path) -> str:
    """Take the digest off a file's end; why it is not the file's, or nothing."""
    size = file.stat().st_size - hashlib.sha256().digest_size
    if size < 0:
        return "it is empty"
    with file.open("r+b") as content:
        content.seek(size)
        sealed = content.read()
        content.truncate(size)
    return "" if _digest(file) == sealed else "it is damaged"


def _digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
