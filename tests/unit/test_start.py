"""The container's start on machines with older and newer drivers than its CUDA; a stand-in for Python says what it would see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BUNDLED = "610.43.02"  # the driver whose libraries the image has


def seen(tmp_path: Path, driver: str | None, **environment: str) -> tuple[str, str]:
    """LD_LIBRARY_PATH and LABELLOOP_GPU_DRIVER of the job's process."""
    tools, compat = tmp_path / "tools", tmp_path / "cuda/compat"
    compat.mkdir(parents=True)
    (compat / f"libcuda.so.{BUNDLED}").touch()
    (compat / "libcuda.so.1").symlink_to(f"libcuda.so.{BUNDLED}")
    tools.mkdir()
    programs = {"python": '[ "$1" = - ] || echo "$LD_LIBRARY_PATH $LABELLOOP_GPU_DRIVER"'}
    if driver:
        programs["nvidia-smi"] = f'[ "$1" = --list-gpus ] && echo GPU 0 || echo {driver}'
    for name, does in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    given = {
        "PATH": f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "CUDA_HOME": str(tmp_path / "cuda"),
        "LD_LIBRARY_PATH": "/its",
    }
    started = ["bash", "training_jobs/start.sh"]
    done = subprocess.run(started, cwd=REPOSITORY, env={**given, **environment}, capture_output=True, text=True, check=True)
    libraries, _, told = done.stdout.strip().partition(" ")
    return libraries, told


@pytest.mark.parametrize("driver", ["550.163.01", "570.86.15", "610.9.01"])
def test_an_older_driver_gets_the_images_cuda_libraries(tmp_path: Path, driver: str) -> None:
    assert seen(tmp_path, driver) == (f"{tmp_path}/cuda/compat:/its", driver)


@pytest.mark.parametrize("driver", [BUNDLED, "610.100.01", "700.1.01"])
def test_a_driver_that_is_new_enough_is_left_alone(tmp_path: Path, driver: str) -> None:
    assert seen(tmp_path, driver) == ("/its", driver)


def test_a_machine_without_a_gpu_tells_of_none(tmp_path: Path) -> None:
    assert seen(tmp_path, None) == ("/its", "")


def test_a_laptop_trains_on_what_it_has(tmp_path: Path) -> None:
    assert seen(tmp_path, "550.163.01", LABELLOOP_OPT_ML=str(tmp_path)) == ("/its", "")
