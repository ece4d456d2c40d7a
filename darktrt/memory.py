"""The memory and the work that darktrt spends on a network or on images, whatever their files say.

Sizes are computed from what a file declares, before anything is allocated. The limits are far above those of real networks and
photographs: they stop misprints and files that were made to exhaust a machine.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

_Tensor = TypeVar("_Tensor", bound=Hashable)

MOST_NETWORK_BYTES = 6 << 30
"""Of a network on one image, as :func:`network_bytes` counts them: 6 GiB. YOLOv4 at 608 x 608 takes 1.2, YOLOv4-P7 at 1536 x
1536, the largest public detector, 5.3."""

MOST_BATCH_BYTES = 3 << 30
"""Of a network on a batch of more images than one, counted likewise: 3 GiB."""

MOST_OPERATIONS = 4 * 10**12
"""Of a network on one image: two per multiply-add. YOLOv4 at 608 x 608 takes 0.13 * 10**12."""

MOST_IMAGE_BYTES = 1 << 30
"""Of the pixels of images that are decoded for one batch or ahead of it: 1 GiB, some 350 million pixels."""

_COPIES = 4
"""Of the weights, at worst: the file's, the module's, those of the exporter and of the file that is written."""


def network_bytes(weights: int, tensors: int) -> int:
    """Bytes of memory that converting or running a network takes, besides the libraries.

    Args:
        weights: bytes of its weights.
        tensors: bytes of its tensors that are in use at once, from :func:`most_at_once`.
    """
    return _COPIES * weights + 2 * tensors  # a library copies a tensor to the layout that it computes in


def most_at_once(steps: Iterable[tuple[Mapping[_Tensor, int], Collection[_Tensor]]]) -> int:
    """The most bytes of tensors in use at once when steps run in order and a tensor is freed behind its last reader.

    Args:
        steps: of each step the bytes of the tensors that it makes, and the tensors that it reads.
    """
    made = list(steps)
    last = {name: i for i, (outputs, inputs) in enumerate(made) for name in (*outputs, *inputs)}
    used: dict[_Tensor, int] = {}
    total = most = 0
    for i, (outputs, inputs) in enumerate(made):
        used.update(outputs)
        total += sum(outputs.values())
        most = max(most, total)
        total -= sum(used.pop(name, 0) for name in (*outputs, *inputs) if last[name] <= i)
    return most


def available_bytes() -> int:
    """The memory that is free on this machine, and no more than the limit of its container."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    with suppress(OSError, ValueError):  # there is no limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free


def gibibytes(size: int) -> str:
    """A number of bytes for a sentence, such as ``3.5 GiB``."""
    return f"{size / 2**30:.1f} GiB"
