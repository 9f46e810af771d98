"""The int8 form of a model file, and whether it serves: only where it is faster here and not worse.

Static quantization (QDQ) of what onnxruntime has int8 kernels for, with ranges measured on training images. What it brings
differs from network to network, so it is measured for each version: mobilenet_v2 takes half of its time, SSDLite nearly all.
"""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from labelloop import problem_types
from labelloop.errors import ModelError
from labelloop.inference import Model
from labelloop.model_config import ModelConfig
from labelloop.promotion import in_points, not_worse
from labelloop.records import METRIC_TITLES, Int8, ModelCard, Region
from labelloop.wording import counted
from training_jobs import paired
from training_jobs.comparison import compare
from training_jobs.dataset import Dataset, Pixels
from training_jobs.export import stamp

log = logging.getLogger(__name__)

type Predict = Callable[[Model, Pixels], Sequence[Sequence[Region]]]
"""What is kept of a model's candidates for each image."""

_GAIN = 0.1  # share of the float model's time that int8 has to save: less is not worth a change of what was trained
_LEAST_MS = 1.0  # of a run: below it a clock's noise counts, and decoding the image takes most of the time anyway
_ROUNDS = 100
_FEWEST_ROUNDS = 9  # of a network that takes long
_PATIENCE = 30.0  # seconds
_TIMED = 8  # images
_CALIBRATED = 64  # images

# Layers have weights. What lies between two of them joins in, so that numbers need not become float and int8 again.
_LAYERS = ("Conv", "Gemm", "MatMul")
_BETWEEN = ("Add", "Clip", "Concat", "MaxPool", "Relu")


def choose(model: Model, file: Path, data: Dataset, config: ModelConfig, predict: Predict) -> tuple[Model, Int8]:
    """The model that serves, float or int8, and why. `file` holds the float `model`, and afterwards the one that serves.

    int8 has to save a tenth of the time on this machine, and to be no worse than float by the promotion gate's own test. The
    test is made on the validation split alone: of a model chosen by the holdout, figures on the holdout would be flattering.
    Where the split is too small to show anything, float serves.

    Weights follow from the data alone, the choice from a clock, too. It goes by medians of CPU time, float and int8 in turns,
    which other processes hardly change: trained again on the same kind of machine, a version can be of the other kind only
    where int8 saves almost exactly a tenth.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "int8.onnx"
        found = _measured(model, file, made, data, config, predict)
        log.info("%s serves: %s", "int8" if found.chosen else "float", found.reason)
        if not found.chosen:
            return model, found
        file.write_bytes(made.read_bytes())
    return Model(file.read_bytes()), found


def _measured(model: Model, file: Path, made: Path, data: Dataset, config: ModelConfig, predict: Predict) -> Int8:
    """What comes of trying int8, cheapest question first. `made` is where its file is written."""
    validation, gate, card = data.validation, config.gate, model.card
    if config.serving.int8 == "never":
        return _no("serving.int8 is never")
    fewest = paired.fewest(gate.margin, gate.confidence)
    if fewest is None or len(validation) < fewest or not validation.measurable:
        return _no(
            f"{counted(len(validation), 'validation image')} cannot show that int8 is not worse by {100 * gate.margin:.3g} "
            "points; " + (f"it takes {fewest:,}" if fewest else "nothing can")
        )
    some = validation.pixels[:_TIMED]
    if race([model], some, _FEWEST_ROUNDS)[0] < _LEAST_MS:
        return _no(f"a run takes less than {_LEAST_MS:.3g} ms")
    try:
        quantize(file, data.train.pixels, made, card)
        int8 = Model(made.read_bytes())
        race([int8], some, 1)
    except ModelError as error:
        return _no(f"int8 does not run: {error}")
    before, after = race([model, int8], some, _ROUNDS)
    figures = Int8(chosen=False, reason="", ms_float=before, ms_int8=after, cpu=cpu())
    times = f"{after:.1f} ms a run instead of {before:.1f} on {figures.cpu}"
    if not saves(before, after):
        return msgspec.structs.replace(figures, reason=f"int8 saves less than {_GAIN:.0%} of the time: {times}")
    ours, theirs = (predict(each, validation.pixels) for each in (int8, model))
    comparison = compare(validation.rows, ours, theirs, card, card, gate)
    if comparison is None:
        raise ModelError("nothing can be compared, although the validation split is measurable")
    metric = METRIC_TITLES[problem_types.of(card.problem_type).metric]
    versus = f"{metric} {in_points(comparison.difference)} on {counted(comparison.images, 'validation image')}"
    chosen = not_worse(comparison, gate)
    reason = f"{times}; {versus}" if chosen else f"int8 is worse, or may be: {versus}; {times}"
    return msgspec.structs.replace(figures, chosen=chosen, reason=reason, difference=comparison.difference)


def saves(before: float, after: float) -> bool:
    """Whether a run that takes so many milliseconds with int8 is worth it."""
    return after <= (1 - _GAIN) * before


def quantize(file: Path, pixels: Pixels, made: Path, card: ModelCard) -> None:
    """Write the int8 form of a float model file: uint8 activations and int8 weights, a scale for each of a layer's channels.

    `pixels`: training images uint8 `[N, height, width, channels]`; ranges are measured on some of them, the same ones each time.
    Weights take 7 bits: on CPUs without VNNI instructions sums of two products of 8 bits saturate, so that the file would
    say something else there than where it was measured. Input, output and embedding stay as they were. Raises `ModelError`.
    """
    some = pixels[np.unique(np.linspace(0, len(pixels) - 1, _CALIBRATED).astype(int))]
    graph = onnx.load(str(file))
    nodes = _inner(graph.graph)
    if not nodes:
        raise ModelError("no layer follows another one")
    _wall_in(graph.graph, nodes)
    add_pre_process_metadata(graph)  # torch's exporter has folded what there was to fold, so that nobody need be warned
    try:
        quantize_static(
            graph,
            made,
            _Images(some),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*_LAYERS, *_BETWEEN],
            nodes_to_quantize=nodes,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    except Exception as error:  # onnxruntime raises bare exceptions of its own
        raise ModelError(f"it cannot be quantized: {str(error).strip().partition('\n')[0]}") from error
    stamp(made, card)


def race(models: Sequence[Model], pixels: Pixels, rounds: int) -> list[float]:
    """Milliseconds of CPU that a run on one image takes, the median of so many rounds in which each model has a turn.

    A run has one thread, this one, so its CPU time is what it would take of a core of its own. Fewer rounds do where they
    take long.
    """
    taken: list[list[float]] = [[] for _ in models]
    for model in models:
        model.run_whole(pixels[:1])  # the first run plans its memory
    began = time.monotonic()
    for number in range(rounds):
        if number >= _FEWEST_ROUNDS and time.monotonic() - began > _PATIENCE:
            break
        image = pixels[[number % len(pixels)]]
        for model, times in zip(models, taken, strict=True):
            before = time.thread_time()
            model.run_whole(image)
            times.append(time.thread_time() - before)
    return [1000 * float(np.median(times)) for times in taken]


def figures(int8: Int8 | None) -> dict[str, float]:
    """What MLflow holds of a version as metrics; what was not measured is not among them."""
    if int8 is None:
        return {}
    difference = int8.difference
    measured = {
        "int8": float(int8.chosen),
        "ms_float": int8.ms_float,
        "ms_int8": int8.ms_int8,
        "int8_difference": difference.value if difference else None,
        "int8_difference_low": difference.low if difference else None,
        "int8_difference_high": difference.high if difference else None,
    }
    return {name: value for name, value in measured.items() if value is not None}


def tags(int8: Int8 | None) -> dict[str, str]:
    """What MLflow says beside a version."""
    return {"precision": "int8" if int8.chosen else "float32", "precision_reason": int8.reason} if int8 else {}


def cpu() -> str:
    """What the machine's CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _no(reason: str) -> Int8:
    return Int8(chosen=False, reason=reason)


def _inner(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes that become int8: layers that have others after them, and what lies between layers.

    So the last layers stay float, which decide; and what reckons boxes from them, to which a 256th of the range is much.
    """
    weights = {tensor.name for tensor in graph.initializer}
    layers = {node.name for node in graph.node if node.op_type in _LAYERS and node.input[1] in weights}
    made_by = {output: node.name for node in graph.node for output in node.output}
    fed = set(layers)  # nodes that are given what layers say, and nothing else
    for node in graph.node:
        sources = {made_by.get(name) for name in node.input if name and name not in weights}
        if node.op_type in _BETWEEN and sources and sources <= fed:
            fed.add(node.name)
    wanted: set[str] = set()  # what a layer depends on
    inner = []
    for node in reversed(graph.node):
        if wanted.isdisjoint(node.output) and node.name not in layers:
            continue
        if node.name in fed and not wanted.isdisjoint(node.output):
            inner.append(node.name)
        wanted.update(node.input)
    return inner


def _wall_in(graph: onnx.GraphProto, inner: Sequence[str]) -> None:
    """Put an operator that changes nothing before the convolutions that see the image, and no other layer's output.

    int8 convolutions want channels last, as the input has them, and onnxruntime's optimizer would have all that lies between
    done so, too: normalising three channels beside each other takes ten times as long, 1.1 of mobilenet_v2's 5 ms. It moves
    nothing over a Reshape.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    said: set[str] = set()  # by layers, or what follows from it
    for node in list(graph.node):
        follows = not said.isdisjoint(node.input)
        if follows or node.op_type in _LAYERS:
            said.update(node.output)
        if follows or node.op_type != "Conv" or node.name not in inner:
            continue
        same, wall = f"{node.name}_same_shape", f"{node.name}_wall"
        graph.initializer.append(numpy_helper.from_array(np.zeros(ranks[node.input[1]], np.int64), same))
        place = [other.name for other in graph.node].index(node.name)
        graph.node.insert(place, helper.make_node("Reshape", [node.input[0], same], [wall], name=wall))
        graph.node[place + 1].input[0] = wall


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Feeds of one image each."""

    def __init__(self, pixels: Pixels) -> None:
        self._feeds: Iterator[dict[str, Any]] = ({"image": pixels[[number]]} for number in range(len(pixels)))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)
