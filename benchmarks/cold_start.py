"""Cold start of every function, with the layers as they are deployed, against the least a process with its model can need.

    uv run python -m benchmarks.cold_start [--runs N] [--json FILE] [--imports]

Each figure is of N fresh interpreters in interleaved order: wall time from the start of the process until it has its answer, and
the CPU time of that. A function's handler is imported; of predict also with an answer to `setup`, and to `predict` for one
task of two models, trained on nothing: the digits' network and torchvision's mobilenet_v2. Those read champion, model and image
from a file server that stands for S3 in another process. The floor imports numpy and onnxruntime and nothing else. boto3, which
Lambda's runtime brings, comes from this environment. `--imports` lists what each function's import is made of instead.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import io
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import boto3
import msgspec
import numpy as np
from PIL import Image

from infra_cdk.constructs.layers import library_folder, model_configs_folder
from infra_cdk.constructs.python_function import function_folder
from infra_cdk.dependency_build import DependencyBuild, host_platform
from infra_cdk.sources import FUNCTIONS, LAYERS, ROOT
from labelloop.artifacts import champion_key, onnx_key
from labelloop.model_config import ModelConfig, ModelConfigs
from labelloop.records import Champion
from training_jobs import architectures
from training_jobs.export import export
from training_jobs.network import build

WITH_INFERENCE = {"predict", "prelabel"}
_BUCKET = "bucket"
_SHOWN = 15  # imports of a function
_PHOTOS = """
name: photos
problem_type: classification
classes: [a, b, c, d, e, f, g, h, i, j]
architecture: {name: mobilenet_v2, weights: none}
image: {width: 224, height: 224, mode: RGB}
hyperparameters: {epochs: 1, batch_size: 32, learning_rate: 0.001}
label_studio: {title: labelloop photos}
retrain: {at: [100]}
"""
_ASK = """
import handler
class Context:
    function_name = function_version = invoked_function_arn = aws_request_id = "none"
    memory_limit_in_mb = 1769
    get_remaining_time_in_millis = lambda self: 29_000
answer = handler.handler({event!r}, Context())
assert answer["statusCode"] == 200 and {expected!r} in answer["body"], answer
"""


@dataclass(frozen=True)
class Package:
    """What a function sees: its folder and its layers, in an interpreter without this environment."""

    path: tuple[Path, ...]
    environment: dict[str, str]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(map(str, self.path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            **self.environment,
        }
        interpreter = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
        return subprocess.Popen([str(interpreter), "-P", "-S", *arguments], env=environment, **options)

    def run(self, code: str) -> tuple[float, float]:
        """Wall and CPU milliseconds of a process until it has run `code`; Lambda tears nothing down afterwards."""
        began = time.perf_counter()
        process = self.start("-c", f"{code}\nimport os\nos._exit(0)", stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, code)
        return 1000 * wall, 1000 * (used.ru_utime + used.ru_stime)

    def imports(self, code: str) -> dict[str, tuple[float, float]]:
        """Milliseconds that each module took: itself, and with what it imported first."""
        errors = self.start("-X", "importtime", "-c", code, stderr=subprocess.PIPE).communicate()[1].decode()
        rows = [line.removeprefix("import time:").split("|") for line in errors.splitlines() if line.startswith("import time:")]
        return {name.strip(): (int(own) / 1000, int(all_) / 1000) for own, all_, name in rows if own.strip().isdigit()}


@contextmanager
def packages() -> Iterator[dict[str, Package]]:
    """By function; and `floor`, which has the inference layer alone. The models are in predict's S3."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runtime, models, s3 = scratch / "runtime", scratch / "models", scratch / "s3"
        for folder in (runtime, models, s3):
            folder.mkdir()
        site = Path(boto3.__file__).parent.parent
        for name in ("boto3", "botocore", "s3transfer", "jmespath", "dateutil", "urllib3", "six.py"):  # Lambda's runtime
            (runtime / name).symlink_to(site / name)
            compiled = compileall.compile_file if name.endswith(".py") else compileall.compile_dir
            compiled(site / name, quiet=2)  # as Lambda's is; uv installs without byte code
        configs = _models(models)
        _fill(s3 / _BUCKET, configs)
        python = {name: _layer(name) for name in ("core", "inference")}
        python["library"] = Path(stack.enter_context(library_folder(compiled=True))) / "python"
        python["configs"] = Path(stack.enter_context(model_configs_folder(configs))) / "python"
        environment = {
            "AWS_ENDPOINT_URL": stack.enter_context(_s3(s3)),
            "LABELLOOP_IMAGES_BUCKET": _BUCKET,
            "LABELLOOP_ARTIFACTS_BUCKET": _BUCKET,
            "LABELLOOP_LABEL_STUDIO_URL": "http://127.0.0.1:1",
            "POWERTOOLS_SERVICE_NAME": "predict",
        }
        found = {"floor": Package((_opt(scratch / "floor", [python["inference"]]),), {})}
        for function in sorted(path.parent.name for path in FUNCTIONS.glob("*/handler.py")):
            layers = ["core", *(["inference"] if function in WITH_INFERENCE else []), "library", "configs"]
            opt = _opt(scratch / function, [python[name] for name in layers])
            task = Path(stack.enter_context(function_folder(function, compiled=True)))
            found[function] = Package((task, opt, runtime), environment)
        yield found


def measure(runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds by process: minimum and median of the wall time, median of the CPU time, both as multiples of the floor's."""
    with packages() as found:
        predict = found["predict"]
        processes = {"floor": (found["floor"], "import numpy, onnxruntime")}
        processes |= {name: (package, "import handler") for name, package in found.items() if name != "floor"}
        processes["predict, setup answered"] = (predict, _ask("digits", "setup", {}, "digits v1"))
        for model, name in (("digits", "digit.png"), ("photos", "photo.jpg")):
            body = {"tasks": [{"id": 1, "data": {"image": f"s3://{_BUCKET}/images/{model}/{name}"}}]}
            processes[f"predict, first prediction ({model})"] = (predict, _ask(model, "predict", body, '"score"'))
        wall, cpu = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for _ in range(runs + 1):
            for name in random.sample(list(processes), len(processes)):
                package, code = processes[name]
                for times, took in zip((wall, cpu), package.run(code), strict=True):
                    times[name].append(took)
    walls, cpus = ({name: statistics.median(t[1:]) for name, t in times.items()} for times in (wall, cpu))  # the first one warms
    return {
        name: {
            "min_ms": round(min(wall[name][1:]), 1),
            "median_ms": round(walls[name], 1),
            "of_floor": round(walls[name] / walls["floor"], 2),
            "cpu_ms": round(cpus[name], 1),
            "cpu_of_floor": round(cpus[name] / cpus["floor"], 2),
        }
        for name in processes
    }


def imports(runs: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By process, the modules that took longest: the least of `runs`, itself and with what it imported first."""
    with packages() as found:
        kinds = {name: (package, "import handler") for name, package in found.items() if name != "floor"}
        kinds["predict with its model runtime"] = (found["predict"], "import handler, labelloop.inference")
        tables: dict[str, dict[str, tuple[float, float]]] = {}
        for kind, (package, code) in kinds.items():
            tries = [package.imports(code) for _ in range(runs)]
            least = {name: tuple(min(part) for part in zip(*(t[name] for t in tries), strict=True)) for name in tries[0]}
            tables[kind] = dict(sorted(least.items(), key=lambda item: -item[1][0])[:_SHOWN])
    return tables


def _layer(name: str) -> Path:
    return DependencyBuild(requirements=LAYERS / name / "requirements.txt", platform=host_platform()).folder() / "python"


def _opt(folder: Path, layers: list[Path]) -> Path:
    """What is `/opt/python` in a function: all layers in one folder."""
    folder.mkdir()
    for part in (part for layer in layers for part in layer.iterdir()):
        (folder / part.name).symlink_to(part)
    return folder


def _models(folder: Path) -> ModelConfigs:
    """digits, as it is in the repository, and a model of mobilenet_v2."""
    repository = ROOT / "model_configs"
    (folder / "digits").symlink_to(repository / "digits")
    (folder / "photos").mkdir()
    (folder / "photos" / "config.yaml").write_text(_PHOTOS)
    classes = "".join(f'<Choice value="{name}"/>' for name in "abcdefghij")
    choices = f'<Choices name="class" toName="image" choice="single">{classes}</Choices>'
    (folder / "photos" / "labeling_template.xml").write_text(f'<View><Image name="image" value="$image"/>{choices}</View>')
    return ModelConfigs(folder)


def _fill(bucket: Path, configs: ModelConfigs) -> None:
    """Version 1 of each model, and an image: 24 × 24 pixels for digits, 1024 × 768 of some 150 kB for photos."""
    noise = np.random.default_rng(0)
    digit = Image.fromarray(noise.integers(0, 256, (24, 24), dtype=np.uint8))
    photo = Image.fromarray(noise.integers(0, 256, (96, 128, 3), dtype=np.uint8)).resize((1024, 768), Image.Resampling.BICUBIC)
    for key, image, options in (("images/digits/digit.png", digit, {}), ("images/photos/photo.jpg", photo, {"quality": 92})):
        file = io.BytesIO()
        image.save(file, Path(key).suffix.removeprefix(".").replace("jpg", "jpeg"), **options)
        _put(bucket / key, file.getvalue())
    for name in configs.names:
        onnx = _untrained(configs, name)
        champion = Champion(
            model=name,
            version=1,
            onnx=onnx_key(name, 1),
            sha256=hashlib.sha256(onnx).hexdigest(),
            metric="accuracy",
            value=0.9,
            n_annotations=100,
            promoted_at="2026-01-01T00:00:00.000+00:00",
        )
        _put(bucket / champion.onnx, onnx)
        _put(bucket / champion_key(name), msgspec.json.encode(champion))


def _untrained(configs: ModelConfigs, name: str) -> bytes:
    config: ModelConfig = configs[name].config
    network = architectures.build(config, None) if name == "photos" else build(configs[name], None)[0]
    image, card = config.image, config.card("0" * 64)
    pixels = np.zeros((2, image.height, image.width, len(image.mode)), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export(network.eval(), card, pixels, file)
        return file.read_bytes()


def _put(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def _ask(model: str, route: str, body: dict[str, Any], expected: str) -> str:
    event = {"resource": f"/{{model}}/{route}", "pathParameters": {"model": model}, "body": json.dumps(body)}
    return _ASK.format(event=event, expected=expected)


@contextmanager
def _s3(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files, as much S3 as a GET needs."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(folder, theirs), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        server.terminate()
        server.join()


def _serve(folder: Path, started: Connection) -> None:
    class Files(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            file = folder / self.path.partition("?")[0].lstrip("/")
            data = file.read_bytes() if file.is_file() else b"<Error><Code>NoSuchKey</Code></Error>"
            self.send_response(200 if file.is_file() else 404)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"0"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    started.send(server.server_address[1])
    server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="fresh processes of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--imports", action="store_true", help=f"the {_SHOWN} modules of each function that take longest")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {options.runs} processes each\n")
    figures: dict[str, Any] = imports(options.runs) if options.imports else measure(options.runs)
    if options.imports:
        for kind, table in figures.items():
            print(f"\n{kind}\n\n| module | ms | ms with what it imports first |\n|---|---|---|")
            for name, (own, all_) in table.items():
                print(f"| {name} | {own:.1f} | {all_:.1f} |")
    else:
        print("| process | min ms | median ms | × floor | CPU ms | × floor |\n|---|---|---|---|---|---|")
        for name, row in figures.items():
            times = f"{row['min_ms']:.0f} | {row['median_ms']:.0f} | {row['of_floor']:.2f}"
            print(f"| {name} | {times} | {row['cpu_ms']:.0f} | {row['cpu_of_floor']:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
