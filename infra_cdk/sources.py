"""Where the deployed code comes from, and the folders that are put together for it at synth."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = ROOT / "functions"
LAYERS = ROOT / "layers"
LIBRARY = LAYERS / "labelloop" / "python" / "labelloop"
TRAINING_JOBS = ROOT / "training_jobs"

# What Python leaves behind; it would change the hash of an unchanged tree.
LITTER = ("__pycache__", "*.pyc", "*.egg-info", ".*")


@contextmanager
def assembled(parts: Mapping[str, Path | bytes]) -> Iterator[str]:
    """A temporary folder holding each file, folder or text under its name, without litter; CDK copies it while it exists."""
    with tempfile.TemporaryDirectory(prefix="labelloop-") as folder:
        for name, source in parts.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            elif source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LITTER), dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
        yield folder
