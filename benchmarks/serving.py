"""The predict function against what a user would pick instead, and against the limit: all in one run, on the same two cores.

    uv run python -m benchmarks.serving [--quick] [--rounds N] [--json FILE] [--plot FILE] [--peer-source DIR] [--emulator]

Contestants, each an HTTP server in processes of its own that is asked for the same networks' predictions of the same images:

- labelloop: `functions/predict/handler.py` behind a thin front, images from a bucket; twice where the network's int8 form is
  so much faster that a training job would try it: with the float file, and with that;
- label-studio-ml: its own server (PyPI's 1.0.9, or the checkout that --peer-source names), torchvision in torch, gunicorn with
  one worker of 8 threads as its template has it, images over HTTP;
- FastAPI with onnxruntime: naive (images one after another, the session as it comes) and tuned (32 threads fetch, each core
  runs one image, no spinning), images over HTTP;
- with --emulator: labelloop as it is deployed on a laptop, with functions, layers and sign-in, asked through the emulator's API;
  images and model lie in the emulator's S3, so it takes part where no latency is added.

The limit is the CPU time of one image's scaled libjpeg-turbo decode, to no less than the model's oversampling asks for, and
bare `session.run` of the served file; it has its turn in each round of each scenario. The peers' packages go into an
environment of their own in labelloop's cache folder. Every request has new addresses, for the peers keep files. The order is
drawn anew each round; figures are medians over the rounds, warm-up dropped.

Other processes on the same cores hurt each contestant in its own way; `sudo chrt -r 1` before the command keeps them off.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import torch
import yaml
from PIL import Image
from torch import nn

from benchmarks import note
from cli.deployment import Deployment
from labelloop import imaging, problem_types
from labelloop.artifacts import champion_key, onnx_key, s3_uri
from labelloop.inference import Model
from labelloop.model_config import ModelFolder
from labelloop.records import Champion, ModelCard, ProblemTypeName, Region
from local import processes
from local.environment import LOOPBACK, aws_environment, clean_environment
from local.stack import LaptopStack
from local.toolchain import cache_folder, find_uv, tool_environment
from training_jobs import architectures, problem, quantization
from training_jobs.dataset import Pixels
from training_jobs.export import export

REPOSITORY = Path(__file__).resolve().parent.parent
PEERS_FILE = Path(__file__).resolve().parent / "serving_peers.py"
IMAGES = "images"  # the bucket
ARTIFACTS = "artifacts"
OURS = "labelloop"
INT8 = "labelloop, int8"
EMULATED = "labelloop, emulator"
NETWORKS: dict[ProblemTypeName, tuple[str, int]] = {
    "classification": ("mobilenet_v2", 224),
    "detection": ("ssdlite320_mobilenet_v3_large", 320),
}
SIZES = {"small": (1024, 768, 12), "large": (4000, 3000, 4)}  # width, height, different files
_NOISE = {"small": 2.0, "large": 14.0}  # levels, so that the files have about 150 KB and 4 MB
_CLASSES = 10
_CONSIDERED = 60  # boxes of some score in an image, as a trained detector gives on a busy one
_PACKAGES = (
    *("torch=={torch}", "torchvision=={torchvision}", "onnxruntime=={onnxruntime}", "numpy=={numpy}", "pillow=={pillow}"),
    *("simplejpeg==1.9.0", "fastapi==0.165.0", "uvicorn==0.54.0", "requests==2.34.2", "gunicorn==27.0.1"),
)
_RELEASE = ("label-studio-ml==1.0.9", "redis==8.1.0", "rq==3.0.0", "semver==3.0.4")  # it imports both, and asks for neither
_CHECKOUT = ("label-studio-sdk==2.1.2", "flask>2.3", "colorama~=0.4", "semver~=3.0.2")


@dataclass(frozen=True)
class Scenario:
    """So many requests of so many tasks from so many clients at once, of images whose store takes so long to answer."""

    kind: ProblemTypeName
    size: str
    tasks: int
    clients: int
    latency_ms: int
    requests: int  # a round, of each client

    @property
    def title(self) -> str:
        clients = f", {self.clients} clients" if self.clients > 1 else ""
        return f"{self.kind}, {self.tasks} {self.size}{clients}, {self.latency_ms} ms"


@dataclass
class Round:
    """What one contestant did in one round of a scenario."""

    milliseconds: list[float]
    tasks_per_s: float
    cpu_ms: float  # a task, of all its processes


@dataclass
class Contestant:
    """`path` is before those of Label Studio's ML backends; `images` before the names of the image files."""

    name: str
    port: int
    pid: int
    images: str
    ours: bool = False
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    rounds: dict[Scenario, list[Round]] = field(default_factory=dict)
    differences: list[float] = field(default_factory=list)  # of the scores from torch's on labelloop's pixels
    same: list[bool] = field(default_factory=list)  # whether labels, and how many of them, are torch's

    def plays(self, scenario: Scenario) -> bool:
        return self.name != EMULATED or scenario.latency_ms == 0


def scenarios(*, quick: bool) -> list[Scenario]:
    few = [
        Scenario("classification", "small", 1, 1, 25, 12),
        Scenario("classification", "small", 32, 1, 25, 6),
        Scenario("classification", "small", 1, 8, 25, 20),  # of fewer the first ones, asked all at once, would be a large part
        Scenario("classification", "large", 8, 1, 25, 4),
    ]
    if quick:
        return few
    return [
        *few,
        Scenario("classification", "small", 1, 1, 0, 12),
        Scenario("classification", "small", 8, 1, 25, 3),
        Scenario("classification", "small", 32, 1, 0, 6),
        Scenario("classification", "large", 1, 1, 25, 5),
        Scenario("classification", "large", 8, 1, 0, 3),
        Scenario("classification", "large", 32, 1, 25, 1),
        Scenario("detection", "small", 1, 1, 25, 8),
        Scenario("detection", "small", 32, 1, 25, 1),
        Scenario("detection", "large", 8, 1, 25, 1),
    ]


# What is served


def photograph(size: str, seed: int) -> bytes:
    """A JPEG with structure at every scale and some noise, as photographs have."""
    width, height, _ = SIZES[size]
    dice = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 128, dtype=np.float32)
    for cells in (4, 16, 64, 128):
        some = Image.fromarray(dice.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture = 0.6 * picture + 0.4 * np.asarray(some.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    picture += dice.normal(0, _NOISE[size], picture.shape).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def make_folder(root: Path, kind: ProblemTypeName, model: str, oversampling: float) -> ModelFolder:
    """A model's folder."""
    name, side = NETWORKS[kind]
    classes = [str(number) for number in range(_CLASSES)]
    folder = root / model
    folder.mkdir(parents=True)
    config = {
        "name": model,
        "problem_type": kind,
        "classes": classes,
        "architecture": {"name": name, "weights": "none"},
        "image": {"width": side, "height": side, "oversampling": oversampling},
        "hyperparameters": {"epochs": 1, "batch_size": 2, "learning_rate": 0.01},
        "label_studio": {"title": f"labelloop {model}"},
        "retrain": {"at": [10]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    control = problem_types.of(kind).control
    items = "".join(f'<{control.item} value="{label}"/>' for label in classes)
    (folder / "labeling_template.xml").write_text(
        f'<View><Image name="image" value="$image"/><{control.tag} name="what" toName="image" '
        f'{control.attribute}="{control.allowed[0]}">{items}</{control.tag}></View>'
    )
    return ModelFolder(folder)


def settle(network: nn.Module, images: torch.Tensor, kind: ProblemTypeName) -> None:
    """Give random weights what training gives: batch norms that know their inputs, outputs that are sure of some things."""
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    detector: Any = network
    network.train()
    with torch.no_grad():
        if kind == "classification":
            network(images)
        else:
            detector.head(list(detector.backbone(detector.transform(list(images))[0].tensors).values()))
        network.eval()
        if kind == "classification":
            last: Any = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
            last.weight *= 2 / network(images).std()
            return
        heads = [layers[-1] for layers in detector.head.classification_head.module_list]
        features = list(detector.backbone(detector.transform(list(images))[0].tensors).values())
        logits = detector.head.classification_head(features)
        for layer in heads:
            layer.weight *= 2 / logits.std()
        logits = detector.head.classification_head(features)
        low, high = 0.0, 20.0  # the background's bias, by bisection
        for _ in range(20):
            bias = (low + high) / 2
            shifted = logits.clone()
            shifted[..., 0] += bias
            found = float((shifted.softmax(-1)[..., 1:] >= 0.05).sum()) / len(images)
            low, high = (bias, high) if found > _CONSIDERED else (low, bias)
        for layer in heads:
            layer.bias.view(-1, _CLASSES + 1)[:, 0] += low


def decoded(data: bytes, card: ModelCard) -> Image.Image:
    return imaging.decode(data, width=card.width, height=card.height, mode=card.mode, oversampling=card.oversampling)


def make_model(folder: ModelFolder, root: Path, files: Sequence[bytes]) -> tuple[Model, nn.Module, Pixels]:
    """Export the network for labelloop (with its champion pointer) and for the peers.

    The loaded model, torch's, and the files' pixels.
    """
    config, kind = folder.config, folder.config.problem_type
    card = config.card("0" * 64)
    torch.manual_seed(0)
    network = architectures.build(config, None)
    pixels = np.stack([np.asarray(decoded(data, card)) for data in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    settle(network, images, kind)
    file = root / onnx_key(kind, 1)
    file.parent.mkdir(parents=True)
    model, _ = export(network, card, pixels[:2], file)
    (root / f"{kind}.onnx").write_bytes(file.read_bytes())
    promote(root, card)
    heads = problem.of(kind).heads(network).eval()
    inner = network[1] if isinstance(network, nn.Sequential) else network  # without the normalisation
    torch.save(inner.state_dict(), root / f"{kind}.pt")
    program = torch.onnx.export(
        heads,
        (images[:1],),
        input_names=["image"],
        output_names=[*problem_types.of(kind).outputs, "embedding"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch exported nothing")
    program.save(str(root / f"{kind}.float.onnx"), external_data=False)
    return model, heads, pixels


def make_int8(folder: ModelFolder, root: Path, model: Model, pixels: Pixels) -> bool:
    """Make the model's int8 form another model of labelloop's, where it saves the time that a training job asks of it.

    The job would then ask for its accuracy, too, which these networks do not have.
    """
    name = folder.config.name
    made = root / onnx_key(name, 1)
    made.parent.mkdir(parents=True)
    card = msgspec.structs.replace(model.card, model=name)
    quantization.quantize(root / onnx_key(model.card.model, 1), pixels, made, card)
    before, after = quantization.race([model, Model(made.read_bytes())], pixels, 50)
    note(f"int8 takes {after:.1f} ms a run instead of {before:.1f}")
    promote(root, card)
    return quantization.saves(before, after)


def promote(root: Path, card: ModelCard) -> None:
    """Have version 1 served."""
    name = card.model
    pointer = Champion(
        model=name,
        version=1,
        onnx=onnx_key(name, 1),
        sha256=hashlib.sha256((root / onnx_key(name, 1)).read_bytes()).hexdigest(),
        metric=problem_types.of(card.problem_type).metric,
        value=0.9,
        n_annotations=100,
        promoted_at="2026-01-01T00:00:00.000+00:00",
    )
    (root / champion_key(name)).parent.mkdir(exist_ok=True)
    (root / champion_key(name)).write_bytes(msgspec.json.encode(pointer))


# Who answers


def peers_python(source: Path | None) -> Path:
    """The peers' environment, made at the first run; another one for a checkout of label-studio-ml."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "onnxruntime", "numpy", "pillow")}
    common = [package.format(**versions) for package in _PACKAGES]
    packages = [*common, *(_CHECKOUT if source else _RELEASE)]
    name = hashlib.sha256(" ".join([sys.version, *packages]).encode()).hexdigest()[:12]
    folder = cache_folder() / f"serving-peers-{name}"
    python = folder / "bin" / "python"
    if not (folder / "whole").is_file():
        log = folder.with_suffix(".log")
        note(f"making the peers' environment {folder}")

        def run(*words: str | Path) -> None:
            command = [find_uv(), *words]
            processes.run_to_end("uv", command, log=log, environment=tool_environment(), folder=REPOSITORY, limit_s=900)

        run("venv", "--clear", "--python", Path(sys.base_prefix) / "bin" / "python3", folder)
        run("pip", "install", "--python", python, *packages)
        (folder / "whole").touch()
    return python


@contextmanager
def served(
    folder: Path, kind: ProblemTypeName, models: dict[str, str], python: Path, source: Path | None, store: int
) -> Iterator[list[Contestant]]:
    """All contestants, ready to be asked for one kind's predictions. `models`: labelloop's contestants, and what they serve."""
    peer = {**clean_environment(), "SERVING_FOLDER": str(folder), "SERVING_KIND": kind, "XDG_CACHE_HOME": str(folder / "cache")}
    peer["PYTHONPATH"] = os.pathsep.join([str(PEERS_FILE.parent), *([str(source)] if source else [])])
    peer |= {"LABEL_STUDIO_URL": f"http://{LOOPBACK}:{store}", "LABEL_STUDIO_API_KEY": "0" * 40}  # as its README asks for
    if source:
        peer["SERVING_CHECKOUT"] = "1"
    ours = {
        **clean_environment(),
        **aws_environment(f"http://{LOOPBACK}:{store}"),
        "PYTHONPATH": str(REPOSITORY / "layers" / "labelloop" / "python"),
        "LABELLOOP_MODEL_CONFIGS": str(folder / "configs"),
        "LABELLOOP_STAGE": "benchmark",
        "LABELLOOP_IMAGES_BUCKET": IMAGES,
        "LABELLOOP_ARTIFACTS_BUCKET": ARTIFACTS,
        "LABELLOOP_LABEL_STUDIO_URL": f"http://{LOOPBACK}:9",
        "LABELLOOP_LABEL_STUDIO_SECRET": "none",
        "POWERTOOLS_SERVICE_NAME": "predict",
    }
    uvicorn = f"{python} -m uvicorn --log-level warning --factory serving_peers:make_fastapi --port".split()
    gunicorn = f"{python} -W ignore -m gunicorn --preload --workers 1 --threads 8 --timeout 0 --bind".split()
    front = [sys.executable, REPOSITORY / "benchmarks" / "serving_front.py", "predict"]
    commands: dict[str, tuple[Callable[[int], Sequence[object]], dict[str, str]]] = {
        **{name: (lambda port: [*front, str(port)], ours) for name in models},
        "label-studio-ml": (
            lambda port: [*gunicorn, f"{LOOPBACK}:{port}", "serving_peers:make_label_studio_ml()"],
            peer,
        ),
        "FastAPI, naive": (lambda port: [*uvicorn, str(port)], peer),
        "FastAPI, tuned": (lambda port: [*uvicorn, str(port)], {**peer, "SERVING_TUNED": "1"}),
    }
    contestants, servers = [], []
    try:
        for name, (command, environment) in commands.items():
            port = processes.free_port()
            log = folder / f"{kind}-{name}.log"
            started = processes.start(
                name, pinned(list(map(str, command(port)))), log=log, environment=environment, folder=folder
            )
            servers.append(started.record)
            model = models.get(name)
            key = f"images/{model or kind}/"
            images = s3_uri(IMAGES, key) if model else f"http://{LOOPBACK}:{store}/{IMAGES}/{key}"
            path = f"/{model}" if model else ""
            contestants.append(Contestant(name, port, started.record.pid, images, ours=bool(model), path=path))
            health = f"http://{LOOPBACK}:{port}/health"
            processes.wait_until_ready(started, lambda health=health: processes.answers(health), limit_s=120)  # type: ignore[misc]
        yield contestants
    finally:
        processes.stop(servers, grace_s=5)


@contextmanager
def emulated(folder: Path, kind: ProblemTypeName) -> Iterator[Contestant]:
    """The laptop's stack, with the model promoted and the images uploaded."""
    stack = LaptopStack(
        folder / f"stack-{kind}", model_configs=folder / "configs", report=lambda part, text: note(f"{part}: {text}")
    )
    try:
        deployment = Deployment.on_laptop(stack.up())
        for key in (onnx_key(kind, 1), champion_key(kind)):
            deployment.artifacts.put(key, (folder / key).read_bytes())
        images = f"images/{kind}/"
        for file in folder.glob("*.jpg"):
            deployment.images.put(images + file.name, file.read_bytes())
        access = deployment.backend(kind)
        address = urllib.parse.urlsplit(access.url)
        yield Contestant(
            EMULATED,
            address.port or 80,
            stack.pids()["emulator"],
            s3_uri(deployment.images.name, images),
            path=address.path,
            headers={"Authorization": access.authorization},
        )
    finally:
        stack.down()


def pinned(command: list[str]) -> list[str]:
    """On the last two cores, where there are more, and the system can."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) <= 2 or shutil.which("taskset") is None:
        return command
    return ["taskset", "-c", ",".join(map(str, cores[-2:])), *command]


@contextmanager
def store_of(folder: Path) -> Iterator[int]:
    """The images and artifacts; its port."""
    port = processes.free_port()
    command: list[str | Path] = [sys.executable, REPOSITORY / "benchmarks" / "serving_front.py", "store", str(port), folder]
    started = processes.start("store", command, log=folder / "store.log", environment=clean_environment(), folder=folder)
    try:
        processes.wait_until_ready(started, lambda: processes.answers(f"http://{LOOPBACK}:{port}/health"), limit_s=30)
        yield port
    finally:
        processes.stop([started.record], grace_s=5)


# Asking


class Client:
    """One connection to a contestant, which keeps it open."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant
        self._http = http.client.HTTPConnection(LOOPBACK, contestant.port, timeout=120)

    def request(self, scenario: Scenario, first: int) -> bytes:
        """A body, made before the clock runs: what the client takes of the cores, no contestant has."""
        tasks = [self._task(scenario, first + number) for number in range(scenario.tasks)]
        return json.dumps({"tasks": tasks, **_PROJECT}).encode()

    def ask(self, body: bytes) -> tuple[float, bytes]:
        """Milliseconds, and the answer."""
        began = time.perf_counter()
        self._post("/predict", body)
        answer = self._http.getresponse()
        content = answer.read()
        took = 1000 * (time.perf_counter() - began)
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {content[:500]!r}")
        return took, content

    def setup(self, template: str) -> None:
        """As Label Studio introduces itself; label-studio-ml makes its model then."""
        body = json.dumps({"project": "1.2", "schema": template, "hostname": "", "access_token": ""})
        self._post("/setup", body.encode())
        self._http.getresponse().read()

    def close(self) -> None:
        self._http.close()

    def _post(self, path: str, body: bytes) -> None:
        asked = self._contestant
        self._http.request("POST", asked.path + path, body, {"Content-Type": "application/json", **asked.headers})

    def _task(self, scenario: Scenario, number: int) -> dict[str, Any]:
        file = f"{scenario.size}{number % SIZES[scenario.size][2]}"
        name = f"{file}.jpg" if self._contestant.name == EMULATED else f"{file}-{uuid.uuid4().hex}.jpg"
        return {"id": number, "data": {"image": self._contestant.images + name}, "meta": {"group": f"{number:064x}"}}


_PROJECT: dict[str, Any] = {"project": "1.2", "label_config": "<View/>", "params": {}}


def measure(contestant: Contestant, scenario: Scenario, requests: int) -> Round:
    clients = [Client(contestant) for _ in range(scenario.clients)]
    bodies = {client: [client.request(scenario, number * scenario.tasks) for number in range(requests)] for client in clients}

    def work(client: Client) -> list[float]:
        return [client.ask(body)[0] for body in bodies[client]]

    before, began = cpu_seconds(contestant), time.perf_counter()
    with ThreadPoolExecutor(len(clients)) as pool:
        times = [took for some in pool.map(work, clients) for took in some]
    wall, cpu = time.perf_counter() - began, cpu_seconds(contestant) - before
    for client in clients:
        client.close()
    tasks = scenario.tasks * len(times)
    return Round(times, tasks / wall, 1000 * cpu / tasks)


def family(contestant: Contestant) -> list[psutil.Process]:
    leader = psutil.Process(contestant.pid)
    return [leader, *leader.children(recursive=True)]


def cpu_seconds(contestant: Contestant) -> float:
    return float(sum(times.user + times.system for times in (process.cpu_times() for process in family(contestant))))


def peak_mb(contestant: Contestant) -> float | None:
    """The most memory that its processes have had, summed; None where the kernel keeps no notes."""
    try:
        notes = [Path(f"/proc/{process.pid}/status").read_text() for process in family(contestant)]
    except OSError:
        return None
    return sum(int(note.split("VmHWM:")[1].split()[0]) for note in notes) * 1024 / 1e6


def limit_ms(python: Path, folder: Path, kind: ProblemTypeName, size: str, oversampling: float) -> float:
    command = [*pinned([str(python), str(PEERS_FILE)]), "limit", folder, kind, size, oversampling, 100 if size == "small" else 25]
    done = subprocess.run(list(map(str, command)), env=clean_environment(), capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def compare(contestant: Contestant, scenario: Scenario, wanted: Sequence[Sequence[Region]]) -> None:
    """Note how far the contestant's predictions are from torch's, image by image: `wanted` is what torch says of each."""
    client = Client(contestant)
    _, answer = client.ask(client.request(replace(scenario, tasks=len(wanted)), 0))
    client.close()
    for result, regions in zip(json.loads(answer)["results"], wanted, strict=True):
        found = [(_label(region), region["score"], _place(region)) for region in result["result"]]
        said = [(region.label, region.score or 0.0, region.box or ()) for region in regions]
        same = sorted(label for label, *_ in found) == sorted(label for label, *_ in said)
        contestant.same.append(same)
        if same:
            pairs = zip(sorted(found), sorted(said), strict=True)
            contestant.differences += [
                max(abs(one - other) for one, other in zip((a[1], *a[2]), (b[1], *b[2]), strict=True)) for a, b in pairs
            ]


def _label(region: dict[str, Any]) -> str:
    value = region["value"]
    return str((value.get("choices") or value.get("rectanglelabels"))[0])


def _place(region: dict[str, Any]) -> tuple[float, ...]:
    """The box as shares: left, top, right, bottom."""
    value = region["value"]
    if "x" not in value:
        return ()
    x, y, width, height = (value[key] / 100 for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def torch_says(model: Model, heads: nn.Module, files: Sequence[bytes]) -> list[list[Region]]:
    """What annotators would be shown if torch served: its outputs on labelloop's pixels of the files."""
    card, kind = model.card, problem_types.of(model.card.problem_type)
    shown = []
    for data in files:
        pixels = torch.from_numpy(np.array(decoded(data, card))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            outputs = [output[0].numpy() for output in heads(pixels)]
        shown.append(kind.chosen(kind.candidates(outputs, card), card))
    return shown


# The whole run


@dataclass
class Figures:
    """Medians over the rounds; `limits` by scenario, CPU-ms a task in each round."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, list[float]] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)


def run(rounds: int, *, quick: bool, source: Path | None, oversampling: float, emulator: bool) -> Figures:
    python, figures = peers_python(source), Figures()
    wanted = scenarios(quick=quick)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        files = {size: [photograph(size, seed) for seed in range(number)] for size, (*_, number) in SIZES.items()}
        for size, some in files.items():
            note(f"{size}: {len(some)} JPEGs of {statistics.mean(map(len, some)) / 1000:.0f} KB")
            for number, data in enumerate(some):
                (folder / f"{size}{number}.jpg").write_bytes(data)
        store = stack.enter_context(store_of(folder))
        for kind in dict.fromkeys(scenario.kind for scenario in wanted):
            note(f"exporting {NETWORKS[kind][0]}")
            model_folder = make_folder(folder / "configs", kind, kind, oversampling)
            model, heads, pixels = make_model(model_folder, folder, files["small"])
            models: dict[str, str] = {OURS: kind}
            if make_int8(make_folder(folder / "configs", kind, f"{kind}_int8", oversampling), folder, model, pixels):
                models[INT8] = f"{kind}_int8"
            with served(folder, kind, models, python, source, store) as contestants, ExitStack() as further:
                if emulator:
                    contestants.append(further.enter_context(emulated(folder, kind)))
                for contestant in contestants:
                    Client(contestant).setup(model_folder.template)
                of_kind = [scenario for scenario in wanted if scenario.kind == kind]
                for size in dict.fromkeys(scenario.size for scenario in of_kind):
                    said = torch_says(model, heads, files[size])
                    scenario = next(scenario for scenario in of_kind if scenario.size == size)
                    for contestant in contestants:
                        compare(contestant, scenario, said)
                for number in range(rounds):
                    play(contestants, of_kind, figures, python, folder, store, oversampling, f"round {number + 1} of {rounds}")
                summarise(contestants, of_kind, figures)
    figures.machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "rounds": rounds,
        "cpu": _cpu_name(),
        "oversampling": oversampling,
    }
    return figures


def play(
    contestants: list[Contestant],
    wanted: list[Scenario],
    figures: Figures,
    python: Path,
    folder: Path,
    store: int,
    oversampling: float,
    title: str,
) -> None:
    """A round: in each scenario the contestants and the limit have a turn, in an order drawn anew."""

    def reach_limit(scenario: Scenario) -> None:
        limit = limit_ms(python, folder, scenario.kind, scenario.size, oversampling)
        figures.limits.setdefault(scenario.title, []).append(limit)

    def compete(contestant: Contestant, scenario: Scenario) -> None:
        if scenario not in contestant.rounds:
            measure(contestant, scenario, 1)  # the warm-up
        contestant.rounds.setdefault(scenario, []).append(measure(contestant, scenario, scenario.requests))

    for scenario in wanted:
        note(f"{title}: {scenario.title}")
        urllib.request.urlopen(f"http://{LOOPBACK}:{store}/latency/{scenario.latency_ms}").read()
        turns: list[Callable[[Scenario], None]] = [reach_limit]
        turns += [partial(compete, contestant) for contestant in contestants if contestant.plays(scenario)]
        random.shuffle(turns)
        for turn in turns:
            turn(scenario)


def summarise(contestants: list[Contestant], wanted: list[Scenario], figures: Figures) -> None:
    ours = [contestant for contestant in contestants if contestant.ours]
    for scenario in wanted:
        limits = figures.limits[scenario.title]
        for contestant in contestants:
            if not contestant.plays(scenario):
                continue
            results = contestant.rounds[scenario]
            times = sorted(took for result in results for took in result.milliseconds)
            cpu = statistics.median(result.cpu_ms for result in results)
            figures.rows.append(
                {
                    **asdict(scenario),
                    "scenario": scenario.title,
                    "contestant": contestant.name,
                    "p50_ms": round(statistics.median(times), 1),
                    "p95_ms": round(times[min(len(times) - 1, int(0.95 * len(times)))], 1),
                    "tasks_per_s": round(statistics.median(result.tasks_per_s for result in results), 1),
                    "cpu_ms": round(cpu, 2),
                    "cpu_of_limit": round(
                        statistics.median(result.cpu_ms / limit for result, limit in zip(results, limits, strict=True)), 2
                    ),
                    "ahead": {one.name: ahead(one.rounds[scenario], results) for one in ours},
                }
            )
    for contestant in contestants:
        figures.memory.append(
            {
                "kind": wanted[0].kind,
                "contestant": contestant.name,
                "peak_mb": peak_mb(contestant),
                "same_labels": sum(contestant.same) / len(contestant.same),
                "largest_difference": max(contestant.differences, default=None),
            }
        )


def ahead(ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, float]:
    """How many times faster, sooner (the median) and cheaper we are, round by round."""
    pairs = list(zip(ours, theirs, strict=True))
    ratios = {
        "faster": [a.tasks_per_s / b.tasks_per_s for a, b in pairs],
        "sooner": [statistics.median(b.milliseconds) / statistics.median(a.milliseconds) for a, b in pairs],
        "cheaper": [b.cpu_ms / a.cpu_ms for a, b in pairs],
    }
    return {name: round(statistics.median(values), 2) for name, values in ratios.items()}


def table(figures: Figures) -> str:
    """Markdown."""
    lines = []
    for title in dict.fromkeys(row["scenario"] for row in figures.rows):
        rows = [row for row in figures.rows if row["scenario"] == title]
        limit = statistics.median(figures.limits[title])
        lines += [
            f"**{title}** (limit {limit:.1f} CPU-ms a task)",
            "",
            "| | p50 ms | p95 ms | tasks/s | CPU-ms a task | × limit"
            + "".join(f" | {name}: tasks/s × | p50 ×" for name in rows[0]["ahead"])
            + " |",
            "|---" * (6 + 2 * len(rows[0]["ahead"])) + "|",
        ]
        lines += [
            f"| {row['contestant']} | {row['p50_ms']:.0f} | {row['p95_ms']:.0f} | {row['tasks_per_s']:.1f} | {row['cpu_ms']:.1f} "
            f"| {row['cpu_of_limit']:.2f} "
            + "".join(f"| {of_ours['faster']:.2f} | {of_ours['sooner']:.2f} " for of_ours in row["ahead"].values())
            + "|"
            for row in rows
        ]
        lines.append("")
    lines += ["| | peak memory MB | same labels as torch | largest difference of scores and boxes |", "|---|---|---|---|"]
    for row in figures.memory:
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        difference = "" if row["largest_difference"] is None else f"{row['largest_difference']:.1e}"
        lines.append(f"| {row['contestant']}, {row['kind']} | {peak} | {row['same_labels']:.0%} | {difference} |")
    return "\n".join(lines)


def plot(figures: Figures, file: Path) -> None:
    """Tasks a second by scenario."""
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(row["scenario"] for row in figures.rows))
    names = list(dict.fromkeys(row["contestant"] for row in figures.rows))
    drawing = Figure(figsize=(9, 0.75 * len(titles) + 1), layout="constrained")
    axes = drawing.subplots()
    high = 1 / (len(names) + 1)
    for place, name in enumerate(names):
        found = {row["scenario"]: row["tasks_per_s"] for row in figures.rows if row["contestant"] == name}
        known = [(number + place * high, found[title]) for number, title in enumerate(titles) if title in found]
        bars = axes.barh([at for at, _ in known], [value for _, value in known], high, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_yticks([number + 0.3 for number in range(len(titles))], titles, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tasks a second, two cores")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(file, dpi=150)


def _cpu_name() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    except (OSError, IndexError):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="(default: 5, quick: 2)")
    parser.add_argument("--quick", action="store_true", help="four scenarios of the classifier")
    parser.add_argument(
        "--oversampling",
        type=float,
        default=1.4,
        help="of the models' config.yaml: 1.4 is fast, 2 careful (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--plot", type=Path, help="draw tasks a second to this file")
    parser.add_argument("--emulator", action="store_true", help="ask the laptop's stack, too; it is started for that")
    parser.add_argument("--peer-source", type=Path, help="a checkout of label-studio-ml-backend instead of the release")
    options = parser.parse_args()
    if options.emulator and options.quick:
        parser.error("--emulator takes part where no latency is added, which --quick leaves out; choose one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then, too
    source = options.peer_source.resolve() if options.peer_source else None
    figures = run(
        options.rounds or (2 if options.quick else 5),
        quick=options.quick,
        source=source,
        oversampling=options.oversampling,
        emulator=options.emulator,
    )
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(asdict(figures), indent=2))
    if options.plot:
        plot(figures, options.plot)


if __name__ == "__main__":
    main()
