"""Where a training job's time goes."""

from __future__ import annotations

import time

from labelloop.records import Timing


class Phases:
    """Seconds by phase, one after the other, and how fast the fit's steps were."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._phase, self._began = "", 0.0
        self._images, self._stepping, self._waited = 0, 0.0, 0.0

    def begin(self, phase: str) -> None:
        """The phase before ends here. One that comes again goes on."""
        self._add_up()
        self._phase, self._began = phase, time.monotonic()

    def steps(self, images: int, seconds: float, waited: float) -> None:
        """Steps of the fit on so many images."""
        self._images += images
        self._stepping += seconds
        self._waited += waited

    def timing(self, decoded: int) -> Timing:
        """Up to now. `decoded`: images that this job had to decode."""
        self.begin(self._phase)
        return Timing(
            seconds={phase: round(seconds, 2) for phase, seconds in self._seconds.items()},
            images_per_second=round(self._images / self._stepping, 1) if self._stepping else None,
            waiting=round(self._waited / self._stepping, 4) if self._stepping else None,
            decoded=decoded,
        )

    def _add_up(self) -> None:
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + time.monotonic() - self._began
