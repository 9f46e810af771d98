"""Which images show the same thing: near duplicates share a content group, and with it split, stream and place in the queue.

A fingerprint is a grey thumbnail. Two images look the same when their thumbnails correlate after the part that one shows more
than the other is cropped away: 1 - correlation may be at most 0.01, and 0.13 more for a whole side that is cropped.
That recognises re-encoded and resized images and crops of up to some 5 % on each side, whatever their brightness, contrast and
colour; `benchmarks/duplicates.py` measures it, with what distinct images are merged by mistake. Not recognised are mirrored,
turned and further cropped images. Images of a fixed camera, in which only something small changes, do look the same.

Images below 32 pixels hold too little to recognise a crop by, and are compared as they are. Those of one brightness hold
nothing to tell them by: each is a group of its own.

Pure Python with Pillow: ingest's layers have no numpy. A new image is compared with all known ones of its project, by 64 bits
at first. At 100,000, which is about as far as it goes, that took 71 ms of processor time an image, 5 s to read the log in a
fresh function, and 157 MB; all of it grows in proportion.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from PIL import Image

from labelloop.errors import ConflictError, LabelloopError
from labelloop.ledger import Ledger
from labelloop.records import Record

_SIDE = 16  # cells, width and height of a thumbnail
_VIEW = 8  # cells, width and height at which two are compared
_SMALL = 32  # pixels; smaller images are compared without regard to crops
_FLAT = 4.0  # grey levels of standard deviation; below, there is nothing to compare
_ALIKE_SMALL = 0.003  # 1 - correlation of small images, at most
_ALIKE = 0.01  # 1 - correlation of others, at most, where neither is cropped …
_ALIKE_CROPPED = 0.13  # … and what is added for each side's share that is
_FARTHEST_CROP = 0.08  # share of a side
_STEP = 0.02  # share of a side, over which the effect of a crop is taken for linear
_STEPS = 5  # after which the search for a crop has settled
_RIDGE = 0.05  # keeps the search from wandering where a crop changes nothing
_BITS = 20  # of 64 in which the thumbnails of similar images may differ: crops of 5 % differ in 18
_SIMILAR = 0.65  # correlation from which a crop is looked for
_CANDIDATES = 32  # looked at closely, the nearest first
_RECENT = 200  # images among which one is familiar or new
_REMEMBERED = 100_000  # images of the other projects, some 160 MB
_ENTRY = 500  # images an entry of the log, 300 KB at most; DynamoDB takes 400


class Fingerprint(Record, frozen=True, kw_only=True):
    """What an image looks like: 16 × 16 grey levels, row by row. `small`: it has less than 32 pixels in width or height.

    Of an image that was erased there are no `cells`: so small a picture of it is still one.
    """

    cells: bytes
    small: bool


class Membership(Record, frozen=True, kw_only=True):
    """The group of an image, and other groups that it resembles as well.

    `familiar`: how well the images before it stand for it, as its rank among the last ones: from 0, like none of them, to 1.
    """

    group: str
    resembles: list[str]
    familiar: float


class Assignment(Record, frozen=True, kw_only=True):
    """One image of the log. `nearest`: the largest correlation with an image before it, 0 without one."""

    sha256: str
    group: str
    resembles: list[str]
    nearest: float
    fingerprint: Fingerprint


_ERASED = Fingerprint(cells=b"", small=False)


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an upright image, which may be decoded to less than its size, but to no less than 64 pixels."""
    small = min(image.size) < _SMALL
    # A triangle blurs; of a few pixels that leaves what survives JPEG.
    smaller = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR if small else Image.Resampling.LANCZOS)
    return Fingerprint(cells=smaller.tobytes(), small=small)


def alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two images look the same."""
    return _closeness(_Look(one), _Look(other)) <= 1


def forget_looks(ledger: Ledger, model: str, project: int, images: Iterable[str]) -> int:
    """Take the fingerprints of images (SHA-256) out of a project's log; how many. They keep their groups, which are hashes.

    A function that has read the log remembers them until Lambda ends it. Raises `ConflictError`, `StorageError`.
    """
    hashes, count = set(images), 0
    for sequence, body in ledger.groups_after(model, project, 0):
        entry = msgspec.json.decode(body, type=list[Assignment])
        found = [one for one in entry if one.sha256 in hashes and one.fingerprint.cells]
        if found:
            emptied = [msgspec.structs.replace(one, fingerprint=_ERASED) if one in found else one for one in entry]
            ledger.rewrite_groups(model, project, sequence, body, msgspec.json.encode(emptied))
            count += len(found)
    return count


class Groups:
    """The content groups of all models, read from the ledger and written there before anybody else is told.

    Each project's groups are a log that only grows. An entry is written only behind the one that was read last, so that of two
    functions at once the second reads what the first has decided, and decides again. Only an erasure changes entries, and it
    changes no group: an image that is uploaded again after one is in the group that it was in.
    """

    def __init__(self, ledger: Ledger, *, remembered: int = _REMEMBERED) -> None:
        """`remembered`: images of other projects that may stay in memory; those used longest ago are read again."""
        self._ledger, self._remembered = ledger, remembered
        self._indexes: dict[tuple[str, int], _Index] = {}  # the last used at the end

    def assign(self, model: str, project: int, images: Mapping[str, Fingerprint]) -> dict[str, Membership]:
        """The membership of each image (SHA-256 → fingerprint), in order. An image that is known keeps its group for ever.

        Raises `StorageError`.
        """
        index = self._index(model, project)
        while new := [sha256 for sha256 in images if not index.knows(sha256)][:_ENTRY]:
            for sequence, body in self._ledger.groups_after(model, project, index.sequence):
                index.read(sequence, msgspec.json.decode(body, type=list[Assignment]))
            decided = [index.decide(sha256, images[sha256]) for sha256 in new if not index.knows(sha256)]
            if decided:
                self._write(model, project, index, decided)
        return {sha256: index.membership(sha256) for sha256 in images}

    def _index(self, model: str, project: int) -> _Index:
        index = self._indexes.pop((model, project), None) or _Index()
        while sum(len(other.looks) for other in self._indexes.values()) > self._remembered:
            del self._indexes[next(iter(self._indexes))]
        self._indexes[model, project] = index
        return index

    def _write(self, model: str, project: int, index: _Index, decided: list[Assignment]) -> None:
        """Write what was decided, or forget it when somebody else has written meanwhile."""
        try:
            self._ledger.append_groups(model, project, index.sequence + 1, msgspec.json.encode(decided))
        except LabelloopError as error:
            index.forget(decided)
            if not isinstance(error, ConflictError):
                raise
        else:
            index.sequence += 1


class _Look:
    """A fingerprint with what is compared first: `bits`, and `view` of mean 0 and length 1, which is empty of a flat image."""

    __slots__ = ("bits", "fingerprint", "view")

    def __init__(self, fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint
        values = array("f", _thumbnail(fingerprint).resize((_VIEW, _VIEW), Image.Resampling.BILINEAR).tobytes())
        median = sorted(values)[len(values) // 2]
        self.bits = sum(1 << place for place, value in enumerate(values) if value > median)
        self.view = _normalised(values) if _deviation(fingerprint.cells) >= _FLAT else array("f")


@dataclass
class _Index:
    """The groups of one project, as of the log's entry `sequence`."""

    sequence: int = 0
    assigned: dict[str, list[Assignment]] = field(default_factory=dict)  # several of one that came again after an erasure
    looks: list[_Look] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)  # of the looks
    groups: list[str] = field(default_factory=list)  # of the looks
    nearest: list[float] = field(default_factory=list)  # of all images

    def read(self, sequence: int, assignments: Iterable[Assignment]) -> None:
        for assignment in assignments:
            if assignment.fingerprint.cells:
                self._add(assignment, _Look(assignment.fingerprint))
            else:
                self.assigned.setdefault(assignment.sha256, []).append(assignment)
        self.sequence = sequence

    def knows(self, sha256: str) -> bool:
        """Whether an image has a group, and its looks are there for others to be compared with."""
        return sha256 in self.assigned and bool(self.assigned[sha256][-1].fingerprint.cells)

    def decide(self, sha256: str, fingerprint: Fingerprint) -> Assignment:
        """Assign a new image: it joins the group of the nearest that looks the same, or starts one."""
        look = _Look(fingerprint)
        if sha256 in self.assigned:
            again = msgspec.structs.replace(self.assigned[sha256][-1], fingerprint=fingerprint)
            self._add(again, look)
            return again
        similar = self._similar(look)
        alike = sorted((_closeness(look, self.looks[at]), self.groups[at]) for _, at in similar[:_CANDIDATES])
        groups = list(dict.fromkeys(group for closeness, group in alike if closeness <= 1)) or [sha256]
        nearest = similar[0][0] if similar else 0.0
        decided = Assignment(
            sha256=sha256, group=groups[0], resembles=sorted(groups[1:]), nearest=round(nearest, 4), fingerprint=fingerprint
        )
        self._add(decided, look)
        return decided

    def forget(self, assignments: Sequence[Assignment]) -> None:
        """Take back what was decided last."""
        for assignment in assignments:
            self.assigned[assignment.sha256].pop()
            if not self.assigned[assignment.sha256]:
                del self.assigned[assignment.sha256]
        left = len(self.looks) - len(assignments)
        del self.looks[left:], self.bits[left:], self.groups[left:], self.nearest[left:]

    def membership(self, sha256: str) -> Membership:
        found = self.assigned[sha256][-1]
        recent = self.nearest[-_RECENT:]  # among all, whoever comes late would be familiar: there is more that looks like it
        familiar = sum((nearest < found.nearest) + (nearest <= found.nearest) for nearest in recent) / 2 / len(recent)
        return Membership(group=found.group, resembles=found.resembles, familiar=familiar)

    def _add(self, assignment: Assignment, look: _Look) -> None:
        self.assigned.setdefault(assignment.sha256, []).append(assignment)
        self.looks.append(look)
        self.bits.append(look.bits)
        self.groups.append(assignment.group)
        self.nearest.append(assignment.nearest)

    def _similar(self, look: _Look) -> list[tuple[float, int]]:
        """Correlations and positions of the images that are worth a closer look, the most similar first."""
        bits, view = look.bits, look.view
        near = [at for at, other in enumerate(self.bits) if (bits ^ other).bit_count() <= _BITS]
        found = [(math.sumprod(view, other), at) for at in near if len(other := self.looks[at].view) == len(view)]
        return sorted((pair for pair in found if pair[0] >= _SIMILAR), reverse=True)


def _closeness(one: _Look, other: _Look) -> float:
    """How far two images lie apart, relative to how far those may that look the same."""
    if not one.view or not other.view:
        return math.inf
    if one.fingerprint.small or other.fingerprint.small:
        return (1 - math.sumprod(one.view, other.view)) / _ALIKE_SMALL
    return _after_crop(_thumbnail(one.fingerprint), _thumbnail(other.fingerprint))


def _after_crop(one: Image.Image, other: Image.Image) -> float:
    """The closeness of two thumbnails after the crop that makes them agree best.

    Gauss-Newton over the four sides. A positive share is cropped from the one, a negative one from the other: what is compared
    is the part that both show.
    """
    crop, best = [0.0] * 4, math.inf
    for step in range(_STEPS + 1):
        ours, theirs = _cropped(one, crop), _cropped(other, [-share for share in crop])
        allowed = _ALIKE + _ALIKE_CROPPED * max(map(abs, crop))
        best = min(best, (1 - math.sumprod(ours, theirs)) / allowed)
        if best <= 1 or step == _STEPS:
            break
        apart = [b - a for a, b in zip(ours, theirs, strict=True)]
        effects = [_effect(one, other, crop, side, ours, theirs) for side in range(4)]
        normal = [[math.sumprod(a, b) + (_RIDGE if a is b else 0) for b in effects] for a in effects]
        change = _solved(normal, [math.sumprod(effect, apart) for effect in effects])
        crop = [min(max(share + more, -_FARTHEST_CROP), _FARTHEST_CROP) for share, more in zip(crop, change, strict=True)]
    return best


def _effect(
    one: Image.Image, other: Image.Image, crop: list[float], side: int, ours: array[float], theirs: array[float]
) -> list[float]:
    """What cropping more of a side changes in the difference of two views, for a whole of the side."""
    if crop[side] < 0:  # then less is cropped from the other
        further = _cropped(other, [-share + _STEP * (at == side) for at, share in enumerate(crop)])
        return [(b - a) / _STEP for a, b in zip(theirs, further, strict=True)]
    further = _cropped(one, [share + _STEP * (at == side) for at, share in enumerate(crop)])
    return [(b - a) / _STEP for a, b in zip(ours, further, strict=True)]


def _cropped(thumbnail: Image.Image, crop: Sequence[float]) -> array[float]:
    """The view of what a crop leaves: shares of left, top, right and bottom; negative ones leave all."""
    left, top, right, bottom = (max(share, 0) * _SIDE for share in crop)
    box = (left, top, _SIDE - right, _SIDE - bottom)
    return _normalised(array("f", thumbnail.resize((_VIEW, _VIEW), Image.Resampling.LANCZOS, box=box).tobytes()))


def _thumbnail(fingerprint: Fingerprint) -> Image.Image:
    return Image.frombytes("L", (_SIDE, _SIDE), fingerprint.cells).convert("F")


def _deviation(cells: bytes) -> float:
    """Standard deviation, in grey levels."""
    mean = sum(cells) / len(cells)
    return math.dist(cells, [mean] * len(cells)) / math.sqrt(len(cells))


def _normalised(values: array[float]) -> array[float]:
    """Mean 0 and length 1; all 0 where the values are equal."""
    mean = sum(values) / len(values)
    length = math.dist(values, [mean] * len(values)) or 1.0
    return array("f", [(value - mean) / length for value in values])


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The solution of a small system of equations, symmetric and positive definite."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for at, pivot in enumerate(rows):
        for row in rows[:at] + rows[at + 1 :]:
            factor = row[at] / pivot[at]
            row[:] = [value - factor * by for value, by in zip(row, pivot, strict=True)]
    return [row[-1] / row[at] for at, row in enumerate(rows)]
