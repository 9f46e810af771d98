"""The most memory that hostile requests take, against a normal one's: each in a fresh process, as Lambda starts one."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import examples
from tests.contract.conftest import Backend
from tests.contract.test_hostile_input import LARGE
from tests.examples import encoded, png_chunk

# Reads events, one a line; says of each its status, its predictions, and the most memory that the process had so far, bytes.
FUNCTION = """
import importlib.util, json, sys, types, warnings
warnings.simplefilter("ignore")
spec = importlib.util.spec_from_file_location("handler", sys.argv[1])
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
context = types.SimpleNamespace(function_name="f", memory_limit_in_mb=1, invoked_function_arn="a", aws_request_id="r")
context.get_remaining_time_in_millis = lambda: 29_000
answers = []
for line in open(sys.argv[2]):
    answer = handler.handler(json.loads(line), context)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    answers.append([answer["statusCode"], answer["body"].count('"result"'), peak])
print(json.dumps(answers))
"""


def serve(events: list[dict[str, Any]], folder: Path) -> list[list[int]]:
    """What the function makes of events in turn, in a fresh process."""
    file = folder / "events.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    command = [sys.executable, "-c", FUNCTION, str(examples.REPOSITORY / "functions" / "predict" / "handler.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def bomb(width: int, height: int, *, colour: int, channels: int, depth: int = 8) -> bytes:
    """A PNG of nothing but zeros."""
    packer, row = zlib.compressobj(9), bytes((width * channels * depth + 7) // 8 + 1)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Images just below and far above the limits; each is a file a thousand times smaller than what it unpacks to."""
    small, grey = examples.png(3), encoded(Image.new("L", (8, 8)), "GIF")
    picture = grey.index(b",", 13)
    return {
        "grey, just taken": bomb(8_900, 8_900, colour=0, channels=1),
        "grey": bomb(20_000, 20_000, colour=0, channels=1),
        "colour, just taken": bomb(6_300, 6_300, colour=2, channels=3),
        "colour": bomb(10_000, 8_000, colour=2, channels=3),
        "transparent, just taken": bomb(4_650, 4_650, colour=6, channels=4),
        "16 bits, just taken": bomb(4_150, 3_600, colour=0, channels=1, depth=16),
        "WebP, just taken": encoded(Image.new("RGB", (3_480, 3_480)), "WEBP", lossless=True, method=0),
        "progressive, just taken": encoded(Image.new("RGB", (5_700, 5_700)), "JPEG", progressive=True, subsampling=0),
        "long JPEG": encoded(Image.new("RGB", (65_000, 450)), "JPEG"),
        "line": bomb(1, 8_000_000, colour=0, channels=1),
        "chunks": small[:33] + png_chunk(b"teSt", b"") * 500_000 + small[33:],
        "text": small[:33] + png_chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(1_000_000), 9)) * 60 + small[33:],
        "profile": small[:33] + png_chunk(b"iCCP", b"C\0\0" + zlib.compress(bytes(300_000_000), 9)) + small[33:],
        "comment": grey[:picture] + b"!\xfe" + b"\1x" * 4_000_000 + b"\0" + grey[picture:],
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's notes on a process are Linux's")
def test_hostile_requests_take_less_than_twice_the_memory_of_a_normal_one(detector: Backend, tmp_path: Path) -> None:
    """A normal one is what Label Studio asks for when a page of photographs of 12 megapixels is opened, two of them WebP."""
    detector.promote(1, examples.brightness_model())

    def ask(tasks: list[Any], model: str = "spots") -> dict[str, Any]:
        return examples.api_event("POST", model, "predict", json.dumps({"tasks": tasks}))

    def task(name: str, data: bytes) -> dict[str, Any]:
        detector.images.put(f"images/spots/{name}", data)
        return {"data": {"image": f"s3://{detector.images.name}/images/spots/{name}"}}

    noise = Image.effect_noise((4_000, 3_000), 40)
    picture = Image.merge("RGB", [noise, noise.rotate(180), noise])
    photograph = task("photograph.jpg", encoded(picture, "JPEG", quality=85))
    web = task("photograph.webp", encoded(picture, "WEBP", quality=50, method=0))
    tasks = [task(f"{digit}.png", examples.png(digit % 10, salt=digit)) for digit in range(32)]
    hostile = {name: task(name, data) for name, data in bombs().items()}
    large = [task("zeros", bytes(60_000_000)), task("more bytes than are read", bytes(80_000_000))]

    [[*few, little]] = serve([ask([*tasks, photograph])], tmp_path)
    [[*many, usual]] = serve([ask([*[photograph] * 30, web, web])], tmp_path)
    assert (few, many) == ([200, 33], [200, 32])
    events = {
        **{f"bomb: {name}": ask([one] * 4) for name, one in hostile.items()},
        "all the bombs": ask([*hostile.values()] * 2),
        **{
            f"body: {name}": examples.api_event("POST", "spots", "predict", body().replace("{bucket}", detector.images.name))
            for name, body in LARGE.items()
        },
        "all the bombs and large files": ask([*hostile.values(), *large] * 4),
    }
    answers = serve(list(events.values()), tmp_path)
    most = dict(zip(events, (peak for _, _, peak in answers), strict=True))
    print("32 small images and a photograph", little // 10**6, "MB, 32 photographs", usual // 10**6, "MB; then, in turn")  # noqa: T201
    print({name: peak // 10**6 for name, peak in most.items()})  # noqa: T201 - the figures
    taken = {name for name, (_, predictions, _) in zip(events, answers, strict=True) if predictions}
    assert taken >= {f"bomb: {name}" for name in hostile if "just taken" in name}, "the limits are where the test thinks"
    assert {status for status, _, _ in answers} == {200, 400}
    assert max(most.values()) < 2 * usual


def enlarged(data: bytes, side: int) -> bytes:
    """A progressive JPEG whose header says that it is so many pixels wide and high."""
    frame = data.index(b"\xff\xc2")
    return data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 :]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's notes on a process are Linux's")
def test_a_page_of_photographs_stays_below_512_mb_whatever_is_among_them(detector: Backend, tmp_path: Path) -> None:
    detector.promote(1, examples.brightness_model())
    noise = Image.effect_noise((4_000, 3_000), 40)
    photograph = encoded(Image.merge("RGB", [noise, noise.rotate(180), noise]), "JPEG", quality=85)
    huge = enlarged(encoded(Image.new("RGB", (2_000, 2_000)), "JPEG", progressive=True), 20_000)
    for name, data in {"photograph.jpg": photograph, "huge.jpg": huge}.items():
        detector.images.put(f"images/spots/{name}", data)
    place = f"s3://{detector.images.name}/images/spots"
    tasks = [{"data": {"image": f"{place}/photograph.jpg"}}] * 31
    body = json.dumps({"tasks": [*tasks[:16], {"data": {"image": f"{place}/huge.jpg"}}, *tasks[15:]]})
    [[status, predictions, peak]] = serve([examples.api_event("POST", "spots", "predict", body)], tmp_path)
    print("32 photographs and a JPEG of 400 megapixels:", peak // 10**6, "MB")  # noqa: T201 - the figure
    assert (status, predictions) == (200, 32), "all but the one that its header gives away"
    assert peak < 512_000_000
