"""Predictions of a detector as Label Studio takes them, and its interactive mode; two models behind one function."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from labelloop.artifacts import Champions, s3_uri
from labelloop.records import Champion
from tests import examples
from tests.contract.conftest import Backend
from tests.examples import encoded, quadrant_model


def quadrants(*bright: int, size: tuple[int, int] = (64, 32)) -> bytes:
    """A PNG with these quadrants (0 left above, 1 right above, 2 left below, 3) at 200 of 255."""
    pixels = np.zeros((2, 2), dtype=np.uint8)
    for quadrant in bright:
        pixels[divmod(quadrant, 2)] = 200
    return encoded(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), "PNG")


def ask(backend: Backend, data: bytes, context: Any = None, *, name: str = "a.png") -> dict[str, Any]:
    backend.images.put(f"images/spots/{name}", data)
    tasks = [{"id": 1, "data": {"image": s3_uri(backend.images.name, f"images/spots/{name}")}}]
    status, answer = backend.ask("POST", "predict", {"tasks": tasks, "params": {"context": context}}, model="spots")
    assert status == 200
    [result] = answer["results"]
    assert isinstance(result, dict)
    return result


def test_boxes_come_in_percent_with_the_images_size(detector: Backend) -> None:
    result = ask(detector, quadrants(1))
    [region] = result["result"]
    score = region.pop("score")
    assert score == pytest.approx(200 / 255, abs=0.05)
    assert region == {
        "from_name": "what",
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 64,
        "original_height": 32,
        "image_rotation": 0,
        "value": {"x": 50.0, "y": 0.0, "width": 50.0, "height": 50.0, "rotation": 0, "rectanglelabels": ["spot"]},
    }
    assert 0 < result["score"] <= 1
    assert result["model_version"] == "spots v1"


def test_an_image_without_anything_is_a_prediction_of_nothing(detector: Backend) -> None:
    result = ask(detector, quadrants())
    assert result["result"] == []
    assert result["score"] > 0.9


def test_a_phones_sideways_image_has_its_boxes_where_a_person_sees_them(detector: Backend) -> None:
    """EXIF orientation 6: the stored right upper quadrant is shown right below."""
    image = Image.open(io.BytesIO(quadrants(1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    [region] = ask(detector, encoded(image, "JPEG", exif=exif, quality=95))["result"]
    assert (region["original_width"], region["original_height"]) == (32, 64)
    assert (region["value"]["x"], region["value"]["y"]) == (50.0, 50.0)


def test_a_click_gets_the_box_under_it(detector: Backend) -> None:
    point = {"type": "keypointlabels", "value": {"x": 20, "y": 80, "width": 0.5, "keypointlabels": ["hole"]}}
    [region] = ask(detector, quadrants(0, 2), {"result": [point]})["result"]
    assert region["type"] == "rectanglelabels"
    assert region["value"]["rectanglelabels"] == ["hole"], "the annotator's class stands"
    assert (region["value"]["x"], region["value"]["y"]) == (0.0, 50.0)


def test_a_rough_rectangle_gets_the_box_that_fits(detector: Backend) -> None:
    rough = {"type": "rectanglelabels", "value": {"x": 45, "y": 5, "width": 40, "height": 30, "rectanglelabels": ["spot"]}}
    [region] = ask(detector, quadrants(0, 1, 2, 3), {"result": [rough]})["result"]
    assert (region["value"]["x"], region["value"]["y"]) == (50.0, 0.0)


def test_a_tool_that_cannot_be_used_gets_an_empty_result(detector: Backend) -> None:
    """The editor reads `result` of whatever comes back from an interactive request."""
    result = ask(detector, quadrants(0), {"result": [{"type": "brushlabels", "value": {}}]})
    assert result == {"result": [], "score": 0.0, "model_version": "spots v1"}


def test_models_do_not_see_each_others_images_or_predictions(detector: Backend) -> None:
    mine = detector.put_image("mine.png", examples.png())  # of digits
    status, answer = detector.ask("POST", "predict", {"tasks": [{"id": 1, "data": {"image": mine}}]}, model="spots")
    assert (status, "lies outside" in answer["results"][0]["error"]) == (200, True)
    status, answer = detector.ask("POST", "setup", {}, model="digits")
    assert answer == {"model_version": "digits v0"}


def test_another_models_file_never_serves(detector: Backend) -> None:
    onnx = quadrant_model("spots", ["spot", "hole"])
    pointer: Champion = examples.champion(1, onnx, "digits")
    detector.artifacts.put(pointer.onnx, onnx)
    Champions(detector.artifacts).swap(pointer, tag=None)
    status, answer = detector.predict({"id": 1, "data": {"image": detector.put_image("a.png", examples.png())}})
    assert status == 500
    assert "is a model of spots, not of digits" in str(answer)
