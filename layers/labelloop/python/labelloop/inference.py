"""Run an ONNX model on images: one session a model, one thread a run.

Threads side by side over images beat one wide batch on a CPU: batches of 8 and 32 cost 1.09 and 1.24 times as much per
image, two threads inside a run 1.19 times the CPU (see docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnxruntime

from labelloop import imaging, problem_types
from labelloop.errors import ModelError
from labelloop.records import ModelCard, Region

CARD_KEY = "labelloop"
EMBEDDING = "embedding"  # the last of the ONNX file's outputs

type Floats = np.ndarray[Any, np.dtype[np.float32]]


class Examined(NamedTuple):
    """What a model says of one image: all that it takes into consideration, best first, and the embedding float32 `[D]`."""

    candidates: list[Region]
    embedding: Floats


class Model:
    """A model file, ready to run. Raises `ModelError` when it is no ONNX file of labelloop's, or an older labelloop's."""

    def __init__(self, onnx: bytes) -> None:
        self.file_size = len(onnx)  # bytes
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors
        try:
            self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
            metadata = self._session.get_modelmeta().custom_metadata_map
            self.card = msgspec.json.decode(metadata[CARD_KEY], type=ModelCard)
            self._type = problem_types.of(self.card.problem_type)
            if self.card.problem_type == "detection" and self.card.boxes is None:
                raise ModelError("the detector's card does not say how its boxes are sifted")
            self._outputs = [*self._type.outputs, EMBEDDING]
            if EMBEDDING not in [output.name for output in self._session.get_outputs()]:
                raise ModelError("the ONNX file has no embedding, it was exported by an older labelloop; train a new version")
        except ModelError:
            raise
        except KeyError:
            raise ModelError(f"the ONNX file has no {CARD_KEY!r} metadata; it was not exported by labelloop") from None
        except msgspec.DecodeError as error:
            raise ModelError(f"the ONNX file's {CARD_KEY!r} metadata cannot be read: {error}") from error
        except Exception as error:  # onnxruntime raises bare exceptions of its own
            raise ModelError(f"the ONNX file cannot be loaded: {str(error).splitlines()[0]}") from error

    def pixels(self, data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Decode an image file to what the model takes: uint8, [height, width, channels]. Raises `ImageError`."""
        return self.decode(data)[0]

    def decode(self, data: bytes) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], tuple[int, int]]:
        """The pixels, and the image's width and height as a person sees it. Raises `ImageError`."""
        card = self.card
        image, size = imaging.decode_sized(
            data, width=card.width, height=card.height, mode=card.mode, oversampling=card.oversampling
        )
        return np.asarray(image, dtype=np.uint8).reshape(card.height, card.width, -1), size

    def run(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> list[Floats]:
        """Run a batch [N, height, width, channels]: the outputs in the problem type's order. Raises `ModelError`.

        A detector takes one image at a time.
        """
        return self.run_whole(pixels)[:-1]

    def run_whole(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> list[Floats]:
        """As `run`, then the embeddings [N, D]. Raises `ModelError`."""
        try:
            outputs: list[Floats] = self._session.run(self._outputs, {"image": pixels})
        except Exception as error:  # onnxruntime raises bare exceptions of its own
            raise ModelError(f"the model does not run: {error}") from error
        if not all(np.isfinite(output).all() for output in outputs):
            raise ModelError("the model's output is not finite")  # Label Studio cannot open a task whose score is no number
        return outputs

    def candidates(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> list[Region]:
        """All that the model takes into consideration for one image [height, width, channels], best first."""
        return self.examine(pixels).candidates

    def examine(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Examined:
        """Candidates and embedding of one image [height, width, channels], from one run. Raises `ModelError`."""
        *outputs, embedding = (output[0] for output in self.run_whole(pixels[np.newaxis]))
        return Examined(self._type.candidates(outputs, self.card), embedding)
