"""Cold import of every function, with the layers as they are deployed, against the least a process with its model can need.

    uv run python -m benchmarks.cold_start [--runs N] [--json FILE]

Each figure is the wall time from the start of a fresh interpreter to an imported handler, in milliseconds, of N processes in
interleaved order. The floor imports numpy and onnxruntime and nothing else. boto3, which Lambda's runtime brings, comes from
this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3

from infra_cdk.dependency_build import DependencyBuild, host_platform
from infra_cdk.sources import FUNCTIONS, LAYERS, LIBRARY

WITH_INFERENCE = {"predict"}


def measure(runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds by function (and `floor`): minimum and median of `runs`, and the ratio of its median to the floor's."""
    with tempfile.TemporaryDirectory() as runtime:
        # Only boto3 and what it needs, as in Lambda's own runtime.
        site = Path(boto3.__file__).parent.parent
        for name in ("boto3", "botocore", "s3transfer", "jmespath", "dateutil", "six.py", "urllib3"):
            (Path(runtime) / name).symlink_to(site / name)
        layers = {name: _layer(name) for name in ("core", "inference")}
        commands = {"floor": ("import numpy, onnxruntime", [layers["inference"]])}
        for function in sorted(path.parent.name for path in FUNCTIONS.glob("*/handler.py")):
            path = [FUNCTIONS / function, LIBRARY.parent, layers["core"], Path(runtime)]
            if function in WITH_INFERENCE:
                path.insert(2, layers["inference"])
            commands[function] = ("import handler", path)
        commands["predict + model runtime"] = ("import handler, labelloop.inference", commands["predict"][1])
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs + 1):
            for name in random.sample(list(commands), len(commands)):
                times[name].append(_run(*commands[name]))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first one warms the page cache
    return {
        name: {
            "min_ms": round(min(values[1:]), 1),
            "median_ms": round(medians[name], 1),
            "of_floor": round(medians[name] / medians["floor"], 2),
        }
        for name, values in times.items()
    }


def _layer(name: str) -> Path:
    return DependencyBuild(requirements=LAYERS / name / "requirements.txt", platform=host_platform()).folder() / "python"


def _run(code: str, path: list[Path]) -> float:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    interpreter = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    began = time.perf_counter()
    subprocess.run([str(interpreter), "-S", "-c", code], env=environment, check=True)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="fresh processes of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    figures = measure(options.runs)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {options.runs} processes each\n")
    print("| process | min ms | median ms | × floor |\n|---|---|---|---|")
    for name, row in figures.items():
        print(f"| {name} | {row['min_ms']:.0f} | {row['median_ms']:.0f} | {row['of_floor']:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
