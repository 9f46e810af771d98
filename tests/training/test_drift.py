"""A training job leaves what later images are compared with: others of the same kind are no drift, changed ones are."""

from __future__ import annotations

import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from cli.examples import digits
from labelloop import problem_types
from labelloop.drift import ALARM, WINDOW, follow, place
from labelloop.inference import Model
from labelloop.records import Drift, Served
from tests.examples import encoded
from tests.training.opt_ml import OptMl, manifest_rows

ANNOTATED = 500
CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "inverted": ImageOps.invert,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 6)),
}


def test_other_images_are_no_drift_and_changed_ones_are(tmp_path: Path, run_here: Callable[[OptMl], int]) -> None:
    images = random.Random(0).sample(digits.load(), len(digits.load()))
    job = OptMl(tmp_path).lay_out(images[:ANNOTATED], manifest_rows(images[:ANNOTATED]), job_name="job-drift")
    assert run_here(job) == 0
    model = Model((job.folder / "model/model.onnx").read_bytes())
    assert model.card.drift is not None
    held_out = sum(row.split == "test" for row in manifest_rows(images[:ANNOTATED]))
    assert (model.card.drift.images, sum(model.card.drift.counts)) == (held_out, held_out)

    later = [example.image for example in images[ANNOTATED:]]
    windows = [later[start : start + WINDOW] for start in range(0, 8 * WINDOW, WINDOW)]
    same = [measured(model, window) for window in windows]
    for kind in ("embedding", "confidence"):
        found = [getattr(one, kind) for one in same]
        assert sum(found) / len(found) < 2.5, f"{kind}: {found}"
        assert sum(value >= ALARM for value in found) <= 1, f"{kind}: {found}"
    for name, change in CHANGES.items():
        drifted = measured(model, [changed(image, change) for image in windows[0]])
        assert max(drifted.embedding or 0, drifted.confidence or 0) >= ALARM, name


def measured(model: Model, images: list[bytes]) -> Drift:
    reference, certainty = model.card.drift, problem_types.of(model.card.problem_type).certainty
    assert reference is not None
    served = []
    for number, image in enumerate(images):
        seen = model.examine(model.pixels(image))
        where = place(reference, seen.embedding)
        served.append(Served(task=number, sha256="", certainty=certainty(seen.candidates, model.card), place=where))
    return follow(reference, served, None)


def changed(image: bytes, change: Callable[[Image.Image], Image.Image]) -> bytes:
    return encoded(change(Image.open(BytesIO(image)).convert("L")), "PNG")
