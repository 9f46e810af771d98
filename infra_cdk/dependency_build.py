"""Builds what a dependency layer holds: one requirements.txt installed by uv for the platform the functions run on, no Docker.

A build is kept in a cache folder under the hash of everything it follows from, and gets there by one rename: a build that was
interrupted is never used.
"""

from __future__ import annotations

import compileall
import hashlib
import os
import platform
import py_compile
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from infra_cdk.sources import ROOT
from labelloop.errors import LocalServiceError

PYTHON = "3.13"
LAMBDA_PLATFORM = "x86_64-manylinux_2_28"  # uv's name for what Lambda's python3.13 on x86_64 runs

# Of Pillow, those that labelloop.imaging does not open.
# fmt: off
OTHER_FORMATS = (
    "Avif", "Blp", "BufrStub", "Cur", "Dcx", "Dds", "Eps", "Fits", "Fli", "Fpx", "Ftex", "Gbr", "GribStub",
    "Hdf5Stub", "Icns", "Ico", "Im", "Imt", "Iptc", "Jpeg2K", "McIdas", "Mic", "Mpeg", "Msp", "Palm", "Pcd",
    "Pcx", "Pdf", "Pixar", "Psd", "Qoi", "Sgi", "Spider", "Sun", "Tga", "Wmf", "Xbm", "Xpm", "XVThumb",
)
# fmt: on

# What no function uses, as globs below python/. Predict's layers have to stay below 95 MB; the largest parts (onnxruntime, numpy
# with its OpenBLAS, obstore) leave 13 MB for everything else. tests/contract/test_packages.py works with what remains.
UNUSED = (
    ".lock",  # uv's
    "bin",
    "*.dist-info/RECORD",
    "*.dist-info/sboms",
    "**/*.pyi",
    "aws_lambda_powertools/event_handler",
    "aws_lambda_powertools/utilities/auth_alpha",
    "aws_lambda_powertools/utilities/circuit_breaker",
    "aws_lambda_powertools/utilities/data_masking",
    "aws_lambda_powertools/utilities/feature_flags",
    "aws_lambda_powertools/utilities/idempotency",
    "aws_lambda_powertools/utilities/kafka",
    "aws_lambda_powertools/utilities/parser",
    "aws_lambda_powertools/utilities/streaming",
    "aws_lambda_powertools/utilities/validation",
    "numpy/*.pxd",
    "numpy/**/tests",
    "numpy/_core/*_tests.*",
    "numpy/_core/_simd.*",  # for numpy's tests
    "numpy/_core/include",
    "numpy/_core/lib",
    "numpy/_pyinstaller",
    "numpy/compat",
    "numpy/conftest.*",
    "numpy/doc",
    "numpy/f2py",
    "numpy/fft",
    "numpy/lib/recfunctions.*",
    "numpy/ma",
    "numpy/matlib.*",
    "numpy/polynomial",
    "numpy/random",
    "numpy/testing",
    "numpy/typing",
    "obstore/auth",
    "obstore/fsspec.*",
    "onnxruntime/Privacy.md",
    "onnxruntime/ThirdPartyNotices.txt",
    "onnxruntime/backend",
    "onnxruntime/capi/libonnxruntime.so*",  # the extension module has all of it linked in
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "PIL/_avif.*",
    "PIL/_imagingcms.*",
    "PIL/_imagingft.*",
    "PIL/_imagingmath.*",
    "PIL/_imagingmorph.*",
    "PIL/_imagingtk.*",
    "PIL/BdfFontFile.py",
    "PIL/ContainerIO.py",
    "PIL/FontFile.py",
    "PIL/GdImageFile.py",
    "PIL/ImageCms.py",
    "PIL/ImageDraw.py",
    "PIL/ImageDraw2.py",
    "PIL/ImageEnhance.py",
    "PIL/ImageFilter.py",
    "PIL/ImageFont.py",
    "PIL/ImageGrab.py",
    "PIL/ImageMath.py",
    "PIL/ImageMorph.py",
    "PIL/ImageQt.py",
    "PIL/ImageShow.py",
    "PIL/ImageStat.py",
    "PIL/ImageText.py",
    "PIL/ImageTk.py",
    "PIL/ImageTransform.py",
    "PIL/ImageWin.py",
    "PIL/PSDraw.py",
    "PIL/PcfFontFile.py",
    "PIL/PdfParser.py",
    "PIL/TarIO.py",
    "PIL/WalImageFile.py",
    *(f"PIL/{name}ImagePlugin.py" for name in OTHER_FORMATS),
    "pillow.libs/libavif*",
    "pillow.libs/libbrotli*",
    "pillow.libs/libfreetype*",
    "pillow.libs/libharfbuzz*",
    "pillow.libs/liblcms2*",
    "pillow.libs/libpng16*",  # freetype's; Pillow reads PNG by itself
    "_yaml",
    "yaml/_yaml.*",  # libyaml; a config is read once
)


def host_platform() -> str | None:
    """uv's name of this machine where that is Lambda's platform, so that both share a build; else None, meaning "as it is"."""
    return LAMBDA_PLATFORM if sys.platform == "linux" and platform.machine() == "x86_64" else None


@dataclass(frozen=True, kw_only=True)
class DependencyBuild:
    """`requirements` lists every package with its version; `platform` is uv's name of one, None for this machine's."""

    requirements: Path
    platform: str | None

    @property
    def key(self) -> str:
        """Hash of all that the build follows from."""
        target = self.platform or sysconfig.get_platform()
        parts = (self.requirements.read_bytes(), target.encode(), Path(__file__).read_bytes())
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]

    def folder(self) -> Path:
        """The built layer: a folder that holds `python/`. Takes a minute the first time. Raises `LocalServiceError`."""
        kept = _cache() / "layers" / self.key
        if kept.is_dir():
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{self.key}.", dir=kept.parent) as scratch:
            built = Path(scratch) / "layer"
            self._build(built / "python")
            try:
                built.rename(kept)
            except OSError:
                if not kept.is_dir():  # otherwise another build of the same was faster
                    raise
        return kept

    def _build(self, target: Path) -> None:
        command = [find_uv(), "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--link-mode", "copy"]
        command += ["--no-compile-bytecode"]  # compile_sources does, for /opt/python; uv's own would lie beside it unused
        command += ["--python", sys.executable, "--python-version", PYTHON, "--target", str(target)]
        command += ["--python-platform", self.platform] if self.platform else []
        command += ["--requirement", str(self.requirements)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LocalServiceError("uv", f"cannot install {self.requirements}:\n{done.stderr.strip()}")
        for pattern in UNUSED:
            for path in list(target.glob(pattern)):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        for library in target.rglob("*.so*"):
            _keep_segments(library)
        compile_sources(target, legacy=True)
        for source in list(target.rglob("*.py")):
            source.unlink()


def find_uv() -> str:
    """The uv that runs us, one on PATH, or the repository's own. Raises `LocalServiceError`."""
    for candidate in _uv_candidates():
        try:
            if subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
                return candidate
        except OSError:
            continue
    raise LocalServiceError("uv", "not found: put it on PATH, name it in the variable UV, or run `make` once, which fetches it")


def _uv_candidates() -> Iterator[str]:
    if given := os.environ.get("UV"):
        yield given
    if found := shutil.which("uv"):
        yield found
    yield str(ROOT / ".uv" / "bin" / "uv")


def _cache() -> Path:
    given = os.environ.get("LABELLOOP_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "labelloop"


def _keep_segments(library: Path) -> None:
    """Leave of a 64-bit ELF file its segments, close together. Loaders read no symbol tables, section headers or gaps.

    A wheel's libraries have holes of megabytes, where auditwheel moved tables to the end.
    """
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [_Segment(*struct.unpack_from("<IIQQQQQQ", data, table + i * size)) for i in range(count)]
    kept, moved = bytearray(), list[tuple[range, int]]()
    for segment in sorted((header for header in headers if header.loads), key=lambda header: header.offset):
        kept += bytes((segment.offset - len(kept)) % segment.alignment)  # a loader maps pages: offset and address stay congruent
        moved.append((segment.place, len(kept) - segment.offset))
        kept += data[segment.offset : segment.offset + segment.length]

    def new(offset: int) -> int:
        return next(offset + by for place, by in moved if offset in place)

    for i, header in enumerate(headers):  # a header without length stands for no place in the file
        offset = new(header.offset) if header.length else header.offset
        struct.pack_into("<IIQQQQQQ", kept, new(table) + i * size, *header._replace(offset=offset))
    struct.pack_into("<QQ", kept, 32, new(table), 0)  # 0: where section headers begin
    struct.pack_into("<HHH", kept, 58, 64, 0, 0)  # the size of one, their number, the one with the names
    library.write_bytes(kept)


class _Segment(NamedTuple):
    """A program header, as it stands in an ELF file."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    length: int
    memory: int
    alignment: int

    @property
    def loads(self) -> bool:
        return self.kind == 1 and self.length > 0

    @property
    def place(self) -> range:
        return range(self.offset, self.offset + self.length)


def compile_sources(target: Path, *, legacy: bool, at: str = "/opt/python") -> None:
    """Byte code for the sources below `target`, which lie in `at` on Lambda: it could not write any, and unpacking would outdate
    an ordinary one. `legacy`: next to the source, where it is found without it. Raises `LocalServiceError`.
    """
    if f"{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        raise LocalServiceError("layers", f"Python {PYTHON} has to compile its own byte code; this is {sys.version.split()[0]}")
    compiled = compileall.compile_dir(
        target,
        quiet=2,
        legacy=legacy,
        stripdir=str(target),
        prependdir=at,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    if not compiled:
        raise LocalServiceError("layers", f"a package in {target} does not compile")
