"""The timing cache: kernel times that TensorRT measured in earlier builds on this machine's GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.engine.options import NONE
from darktrt.engine.target import Target, gpu_name
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, cache_folder, make_folder, read_bytes
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    from darktrt.engine.trt_types import Config


_MOST_BYTES = 1 << 30
"""The largest timing cache that is read; a large network's has some megabytes."""


def default_timing_cache(target: Target) -> Path:
    """The file of this TensorRT and this machine's GPU; the times are worth nothing to any other."""
    name = f"{target} {gpu_name()}".replace(" ", "-").replace("/", "-")
    return cache_folder() / "timing" / f"{name}.cache"


def load_timing_cache(config: Config, named: str | Path | None, target: Target, times: bytes = b"") -> None:
    """Set the timing cache of a build: ``times``, or else the content of the file.

    Args:
        named: as :attr:`darktrt.engine.options.BuildOptions.timing_cache`.

    Raises:
        DarktrtError: the named file cannot be read or does not fit, or the target measures nothing as it builds.
    """
    if not target.has_timing_cache:
        if named not in (None, NONE):
            raise DarktrtError(f"{target} measures nothing while it builds; leave the timing cache out", "timing_cache")
    elif times or named == NONE:
        _set(config, times)
    else:
        _load_file(config, named, target)


def _load_file(config: Config, named: str | Path | None, target: Target) -> None:
    path = Path(named or default_timing_cache(target))
    try:
        if _set(config, read_bytes(path, _MOST_BYTES) if os.path.exists(path) else b""):
            return
        problem = f"{path}: is no timing cache of {target} on this GPU"
    except DarktrtError as error:
        problem = str(error)
    if named is not None:
        raise DarktrtError(f"{problem}; delete it or name another file", "timing_cache")
    LOGGER.warning(f"{problem}; all times are measured anew")
    _set(config, b"")


def _set(config: Config, content: bytes) -> bool:
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, False))


def save_timing_cache(config: Config, named: str | Path | None, target: Target) -> bytes:
    """Write the times of a build to their file, and return them; empty for a target that measures nothing.

    A default file that cannot be written is only warned of: the engine is worth more.

    Raises:
        DarktrtError: the named file cannot be written.
    """
    if not target.has_timing_cache:
        return b""
    times = bytes(config.get_timing_cache().serialize())
    if named != NONE:
        _save_file(times, named, target)
    return times


def _save_file(times: bytes, named: str | Path | None, target: Target) -> None:
    path = Path(named or default_timing_cache(target))
    try:
        if named is None:
            make_folder(path.parent)
        with atomic_output(path) as temporary:
            temporary.write_bytes(times)
    except DarktrtError as error:
        if named is not None:
            raise
        LOGGER.warning(f"the measured times cannot be kept: {error}")
