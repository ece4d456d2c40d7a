"""The settings of a calibration."""

from __future__ import annotations

from dataclasses import dataclass, fields

from darktrt.calib.bias_correction import MOST_IMAGES
from darktrt.calib.threshold import Method, check_method
from darktrt.errors import DarktrtError


@dataclass(frozen=True)
class CalibrationSettings:
    """The settings that decide what a calibration file holds; the defaults are the command line's.

    Raises:
        DarktrtError: on creation, when a value is out of its range.
    """

    limit: int | None = None
    """Calibrate on a random sample of this size, where there are more images."""
    seed: int = 0
    """Of that sample."""
    method: Method = "auto"
    percentile: float = 99.99
    """For the method of that name, above 0 and at most 100."""
    bias_images: int = 64
    """Images of the second pass, which measures channel means to correct biases by; 0 leaves the biases as they are."""
    fp_layer_images: int = 8
    """Images of the third pass, which measures the convolutions to leave in floating point; 0 leaves only the first one and
    those of the heads."""

    def __post_init__(self) -> None:
        check_method(self.method, self.percentile)
        for name, value, least in (
            ("limit", self.limit, 1),
            ("bias_images", self.bias_images, 0),
            ("fp_layer_images", self.fp_layer_images, 0),
        ):
            if value is not None and value < least:
                raise DarktrtError(f"{name} is {value}; it must be at least {least}", argument=name)
        if self.bias_images > MOST_IMAGES:
            raise DarktrtError(f"bias_images is {self.bias_images}; it must be at most {MOST_IMAGES}", argument="bias_images")


@dataclass(frozen=True)
class CalibrationOptions(CalibrationSettings):
    """The settings of a calibration, and how to run it."""

    resume: bool = False
    """Go on with a run that was interrupted, or add to a calibration that is whole."""
    skip_bad: bool = False
    """Leave out images that cannot be read, and list them."""

    @property
    def settings(self) -> CalibrationSettings:
        """Those that go into the file."""
        return CalibrationSettings(**{one.name: getattr(self, one.name) for one in fields(CalibrationSettings)})
