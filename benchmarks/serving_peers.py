"""The services that predict is measured against, and the bare limit; runs in the peers' environment, which has no labelloop.

    python serving_peers.py limit FOLDER KIND SIZE OVERSAMPLING RUNS     # prints CPU milliseconds an image
    gunicorn … "serving_peers:make_label_studio_ml()"
    uvicorn … --factory serving_peers:make_fastapi

SERVING_FOLDER holds what `benchmarks.serving` wrote: the networks' weights, their ONNX files, the images. SERVING_KIND is
`classification` or `detection`; SERVING_TUNED makes the FastAPI service the tuned one.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDES = {"classification": 224, "detection": 320}
CLASSES = 10
SHOWN = 0.3  # score from which a box is shown
OVERLAP = 0.5  # IoU above which the less sure one of two boxes goes


def choice(label: int, score: float) -> dict[str, Any]:
    region = {"from_name": "what", "to_name": "image", "type": "choices", "value": {"choices": [str(label)]}, "score": score}
    return {"result": [region], "score": score}


def rectangles(boxes: Any, labels: Any, scores: Any) -> dict[str, Any]:
    """Boxes `[N, 4]` as shares of the image."""
    result = [
        {
            "from_name": "what",
            "to_name": "image",
            "type": "rectanglelabels",
            "value": {
                "x": 100 * float(x0),
                "y": 100 * float(y0),
                "width": 100 * float(x1 - x0),
                "height": 100 * float(y1 - y0),
                "rotation": 0,
                "rectanglelabels": [str(int(label))],
            },
            "score": float(score),
        }
        for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores, strict=True)
    ]
    return {"result": result, "score": float(max(scores, default=0.0))}


def torch_model(kind: str, folder: Path) -> Any:
    """File → prediction, as torchvision's own documentation does it."""
    import torch
    from torchvision import models
    from torchvision.transforms import v2

    state = torch.load(folder / f"{kind}.pt", weights_only=True)
    if kind == "classification":
        network: Any = models.mobilenet_v2(weights=None, num_classes=CLASSES)
    else:
        network = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    network.load_state_dict(state)
    network.eval()
    steps: list[Any] = [v2.ToImage()]
    if kind == "classification":
        steps.append(v2.Resize((SIDES[kind], SIDES[kind]), antialias=True))
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if kind == "classification":
        steps.append(v2.Normalize(MEAN, STD))
    transform = v2.Compose(steps)

    def predict(path: str | io.BytesIO) -> dict[str, Any]:
        image = Image.open(path).convert("RGB")
        with torch.inference_mode():
            if kind == "classification":
                best = torch.softmax(network(transform(image)[None])[0], 0).max(0)
                return choice(int(best.indices), float(best.values))
            (found,) = network([transform(image)])
            kept = found["scores"] >= SHOWN
            boxes = found["boxes"][kept] / torch.tensor([image.width, image.height] * 2)
            return rectangles(boxes, found["labels"][kept] - 1, found["scores"][kept])

    return predict


def onnx_model(kind: str, folder: Path, *, tuned: bool) -> Any:
    """File → prediction with onnxruntime; naive: as a session comes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if tuned:
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(folder / f"{kind}.float.onnx"), options, providers=["CPUExecutionProvider"])
    side = SIDES[kind]

    def predict(data: bytes) -> dict[str, Any]:
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        pixels = (np.asarray(image, dtype=np.float32) / 255).transpose(2, 0, 1)[None]
        if kind == "classification":
            (logits,) = session.run(["logits"], {"image": pixels})
            exponentials = np.exp(logits[0] - logits[0].max())
            probabilities = exponentials / exponentials.sum()
            best = int(probabilities.argmax())
            return choice(best, float(probabilities[best]))
        boxes, scores = session.run(["boxes", "scores"], {"image": pixels})
        anchors, labels = np.nonzero(scores[0] >= SHOWN)
        kept = nms(boxes[0, anchors, 0], scores[0, anchors, labels], labels)
        return rectangles(boxes[0, anchors, 0][kept], labels[kept], scores[0, anchors, labels][kept])

    return predict


def nms(boxes: Any, scores: Any, labels: Any) -> list[int]:
    waiting, kept = np.argsort(-scores), []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    while len(waiting):
        best, waiting = int(waiting[0]), waiting[1:]
        kept.append(best)
        shared = np.minimum(boxes[waiting, 2:], boxes[best, 2:]) - np.maximum(boxes[waiting, :2], boxes[best, :2])
        both = np.clip(shared, 0, None).prod(axis=1)
        waiting = waiting[(both / (areas[waiting] + areas[best] - both) <= OVERLAP) | (labels[waiting] != labels[best])]
    return kept


def make_label_studio_ml() -> Any:
    """label-studio-ml's own server, with a model as its examples are written."""
    from label_studio_ml import api
    from label_studio_ml.model import LabelStudioMLBase

    checkout = "SERVING_CHECKOUT" in os.environ
    if not checkout:
        from label_studio_ml.utils import get_image_local_path

    predict_file = torch_model(os.environ["SERVING_KIND"], Path(os.environ["SERVING_FOLDER"]))

    class Backend(LabelStudioMLBase):  # type: ignore[misc]
        def predict(self, tasks: list[Any], **_: Any) -> list[Any]:
            if checkout:
                paths = (self.get_local_path(task["data"]["image"], task_id=task["id"]) for task in tasks)
            else:
                paths = (get_image_local_path(task["data"]["image"]) for task in tasks)
            return [predict_file(path) for path in paths]

        def fit(self, *_: Any, **__: Any) -> dict[str, Any]:
            return {}

    return api.init_app(Backend)


def make_fastapi() -> Any:
    import requests
    from fastapi import Body, FastAPI

    tuned = "SERVING_TUNED" in os.environ
    kind = os.environ["SERVING_KIND"]
    predict_bytes = onnx_model(kind, Path(os.environ["SERVING_FOLDER"]), tuned=tuned)
    app = FastAPI()
    body = Body()

    if not tuned:

        @app.post("/predict")
        def predict(request: dict[str, Any] = body) -> dict[str, Any]:
            addresses = [task["data"]["image"] for task in request["tasks"]]
            return {"results": [predict_bytes(requests.get(address, timeout=20).content) for address in addresses]}

    else:
        cores = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        fetching, working = ThreadPoolExecutor(32), ThreadPoolExecutor(cores)
        http = requests.Session()
        http.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=32))

        def examine(answer: Any) -> dict[str, Any]:
            found: dict[str, Any] = predict_bytes(answer.result().content)
            return found

        @app.post("/predict")
        def predict_tuned(request: dict[str, Any] = body) -> dict[str, Any]:
            fetched = [fetching.submit(http.get, task["data"]["image"], timeout=20) for task in request["tasks"]]
            found = [working.submit(examine, answer) for answer in fetched]
            return {"results": [one.result() for one in found]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "UP"}

    return app


def limit(folder: Path, kind: str, size: str, oversampling: float, runs: int) -> float:
    """CPU milliseconds of an image: best scaled libjpeg-turbo decode and bare run of the served file; a mean, as theirs."""
    import onnxruntime
    import simplejpeg

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(folder / f"{kind}.onnx"), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    side = SIDES[kind]
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    files = [path.read_bytes() for path in sorted(folder.glob(f"{size}*.jpg"))]
    least = round(oversampling * side)
    times = []
    for turn in range(runs + 3):
        began = time.thread_time()
        simplejpeg.decode_jpeg(files[turn % len(files)], min_height=least, min_width=least)
        session.run(outputs, {"image": pixels})
        times.append(1000 * (time.thread_time() - began))
    return float(np.mean(times[3:]))


if __name__ == "__main__":
    _, _, folder_name, kind_name, size_name, factor, number = sys.argv
    print(json.dumps(limit(Path(folder_name), kind_name, size_name, float(factor), int(number))))
