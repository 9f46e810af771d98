"""Running an ONNX model: what it answers, and what it says when it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from labelloop.errors import ImageError, ModelError
from labelloop.inference import Model
from labelloop.predict import ModelCache
from labelloop.records import ModelCard
from tests.examples import DIGITS, brightness_model, grey, model_card, png, quadrant_model


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(brightness_model())


@pytest.mark.parametrize("digit", range(10))
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_an_image_file_gets_its_class_and_probability(model: Model, digit: int, mode: str) -> None:
    best = model.candidates(model.pixels(png(digit, mode=mode)))[0]
    assert best.label == DIGITS.classes[digit]
    assert best.score is not None
    assert 0.9 < best.score <= 1


def test_the_card_says_what_the_model_takes(model: Model) -> None:
    assert model.card == model_card()
    pixels = model.pixels(png(9, size=(40, 30)))
    assert pixels.shape == (16, 16, 1)
    assert pixels.dtype == np.uint8


def test_a_batch_gives_what_single_images_give(model: Model) -> None:
    batch = np.stack([model.pixels(png(digit)) for digit in range(10)])
    (together,) = model.run(batch)
    assert together.shape == (10, 10)
    apart = np.concatenate([model.run(image[np.newaxis])[0] for image in batch])
    np.testing.assert_allclose(together, apart, rtol=1e-6)


def test_an_image_is_examined_in_one_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, session = 0, model._session

    def run(*given: Any) -> Any:
        nonlocal runs
        runs += 1
        return session.run(*given)

    monkeypatch.setattr(model, "_session", SimpleNamespace(run=run))
    pixels = model.pixels(png(3))
    candidates, embedding = model.examine(pixels)
    assert runs == 1
    assert candidates == model.candidates(pixels)
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, [grey(3)])


def test_a_broken_image_is_an_image_error(model: Model) -> None:
    with pytest.raises(ImageError):
        model.pixels(b"no image")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be loaded"),
        (b"this is no ONNX", "cannot be loaded"),
        (brightness_model()[:-200], "cannot be loaded|no 'labelloop' metadata"),
        (brightness_model(card=False), "no 'labelloop' metadata"),
    ],
)
def test_what_is_no_model_of_ours_is_a_model_error(data: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Model(data)


def test_a_model_that_computes_no_number_is_a_model_error() -> None:
    """A score that is no number would keep Label Studio from opening the task."""
    broken = Model(brightness_model(sharpness=float("nan")))
    with pytest.raises(ModelError, match="not finite"):
        broken.candidates(broken.pixels(png(3)))


def test_a_detector_that_does_not_say_how_its_boxes_are_sifted_is_refused() -> None:
    file = onnx.load_model_from_string(quadrant_model("spots", ["spot"]))
    card = msgspec.json.decode(file.metadata_props[0].value, type=ModelCard)
    file.metadata_props[0].value = msgspec.json.encode(msgspec.structs.replace(card, boxes=None)).decode()
    with pytest.raises(ModelError, match="how its boxes are sifted"):
        Model(file.SerializeToString())


def test_a_file_without_an_embedding_is_refused() -> None:
    file = onnx.load_model_from_string(brightness_model())
    del file.graph.output[1]
    with pytest.raises(ModelError, match="train a new version"):
        Model(file.SerializeToString())


def test_pixels_of_another_shape_are_a_model_error(model: Model) -> None:
    with pytest.raises(ModelError, match="does not run"):
        model.run(np.zeros((1, 8, 8, 1), dtype=np.uint8))


def padded(size: int) -> bytes:
    """A model's file with so many bytes more."""
    file = onnx.load_model_from_string(brightness_model())
    file.doc_string = "x" * size
    return bytes(file.SerializeToString())


def test_the_cache_keeps_what_was_used_last(model: Model) -> None:
    cache = ModelCache(capacity=2 * model.file_size)
    cache.put("a", model)
    cache.put("b", model)
    assert cache.get("a") is model
    cache.put("c", model)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (model, None, model)


def test_the_cache_is_bounded_by_what_model_files_weigh(model: Model) -> None:
    """A large one takes the place of several small ones, and stays even when it is larger than all there is."""
    large = Model(padded(5 * model.file_size))
    cache = ModelCache(capacity=5 * model.file_size)
    for name in "abcde":
        cache.put(name, model)
    assert all(cache.get(name) is model for name in "abcde")
    cache.put("large", large)
    assert cache.get("large") is large
    assert not any(cache.get(name) for name in "abcde")
    cache.put("a", model)
    assert (cache.get("large"), cache.get("a")) == (None, model)
