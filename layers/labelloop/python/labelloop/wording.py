"""How numbers are said to a person."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things: "1 image", "2,000 images". `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
