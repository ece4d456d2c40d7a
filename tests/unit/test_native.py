"""The compiled form of fitting images, against NumPy's bit by bit; and without it."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darktrt.cli import main
from darktrt.errors import DarktrtError
from darktrt.metadata import InputForm, ResizePolicy
from darktrt.vision import images, native
from darktrt.vision.images import preprocess

Array = np.ndarray[Any, Any]

compiled = pytest.mark.skipif(
    images.compiled_fit() is None, reason="needs the compiled resize: pip install -e . with a C++ compiler"
)
POLICIES: tuple[ResizePolicy, ...] = ("stretch", "letterbox")
FORMS: tuple[InputForm, ...] = ("uint8", "float")
SIZES = [(1, 1), (1, 640), (640, 1), (2, 2), (3, 5), (31, 29), (13, 640), (481, 641), (416, 416), (1080, 1920)]
"""Height, width of images."""


def noise(height: int, width: int) -> Array:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def agree(image: Array, width: int, height: int, channels: int, policy: ResizePolicy, form: InputForm) -> None:
    fit = images.compiled_fit()
    assert fit
    fitted, expected = (one(image, width, height, channels, policy, form) for one in (fit, images.numpy_fit))
    assert (fitted.shape, fitted.dtype, fitted.flags.c_contiguous) == (expected.shape, expected.dtype, True)
    assert fitted.tobytes() == expected.tobytes()


@compiled
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("network", [(416, 416), (96, 64), (33, 65), (1, 1), (7, 1)])
def test_the_bits_are_numpys(network: tuple[int, int], channels: int, policy: ResizePolicy, form: InputForm) -> None:
    for size in SIZES:
        agree(noise(*size), *network, channels, policy, form)


@compiled
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_8k(policy: ResizePolicy, form: InputForm) -> None:
    agree(noise(4320, 7680), 608, 608, 3, policy, form)


SIDES = st.integers(1, 300)


@compiled
@settings(deadline=None, max_examples=200)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([1, 3]), st.sampled_from(POLICIES), st.sampled_from(FORMS))
def test_any_size(
    rows: int, columns: int, width: int, height: int, channels: int, policy: ResizePolicy, form: InputForm
) -> None:
    agree(noise(rows, columns), width, height, channels, policy, form)


VIEWS = {
    "upside down": lambda a: a[::-1],
    "mirrored": lambda a: a[:, ::-1],
    "BGR": lambda a: a[:, :, ::-1],
    "every second pixel": lambda a: a[::2, ::2],
    "turned": lambda a: a.transpose(1, 0, 2),
    "a part": lambda a: a[5:40, 7:50],
    "planes": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
    "Fortran order": np.asfortranarray,
    "one row, repeated": lambda a: np.broadcast_to(a[:1], a.shape),
    "not aligned": lambda a: np.frombuffer(b"." + a.tobytes(), np.uint8, offset=1).reshape(a.shape),
}


@compiled
@pytest.mark.parametrize("view", VIEWS)
def test_arrays_that_are_not_contiguous(view: str) -> None:
    for form in FORMS:
        agree(VIEWS[view](noise(48, 64)), 37, 29, 3, "letterbox", form)


@compiled
def test_many_threads_at_once() -> None:
    many = [noise(50 + i, 200 - i) for i in range(64)]
    expected = [images.numpy_fit(image, 64, 96, 3, "letterbox", "float") for image in many]
    with ThreadPoolExecutor(8) as pool:
        fitted = pool.map(lambda image: preprocess(image, 64, 96, 3, "letterbox", "float")[0], many * 4)
    for array, right in zip(fitted, expected * 4, strict=True):
        np.testing.assert_array_equal(array, right)


@compiled
def test_numbers_of_numpy_are_sizes_too() -> None:
    preprocess(noise(9, 9), *np.array([4, 5]), np.int64(3), "stretch", "uint8")  # type: ignore[arg-type]


@compiled
def test_sizes_that_cannot_be_fitted() -> None:
    with pytest.raises(DarktrtError, match="an image of 16777217x1 cannot be fitted into 4x4"):
        preprocess(np.zeros((1, (1 << 24) + 1, 3), np.uint8), 4, 4, 3, "stretch", "uint8")


@compiled
def test_it_needs_no_library_of_cpp() -> None:
    """Which a wheel would then bring, or tie to a version."""
    library = native.library_path()
    assert library and b"libstdc++" not in library.read_bytes()


# --- without it ---


def put(folder: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of that content beside a module in ``folder``, which becomes native.py."""
    path = folder / native.FILE_NAME
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
    monkeypatch.setattr(images, "compiled_fit", images.compiled_fit.__wrapped__)
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not found; would allow"),
        (b"", "not usable"),
        (b"#!/bin/sh\n", "not usable"),
        (Path(np.random.mtrand.__file__), "not usable"),
    ],
    ids=["missing", "empty", "text", "another library"],
)
def test_without_a_library_numpy_does_the_work(
    content: bytes | Path | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, content.read_bytes() if isinstance(content, Path) else content, monkeypatch)
    assert images.compiled_fit() is None
    image = noise(31, 29)
    np.testing.assert_array_equal(
        preprocess(image, 8, 9, 3, "stretch", "float")[0], images.numpy_fit(image, 8, 9, 3, "stretch", "float")
    )
    main(["doctor"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "compiled resize" in line]
    assert said in line


def bits_off(*arguments: Any) -> Array:
    array = images.numpy_fit(*arguments)
    return np.nextafter(array, 2) if array.dtype == np.float32 else array


def refusing(*arguments: Any) -> Array:
    raise DarktrtError("cannot be fitted")


@pytest.mark.parametrize("fit", [bits_off, refusing])
def test_a_library_that_is_not_exact_is_not_used(fit: native.Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_fit", lambda: fit)
    assert images.compiled_fit.__wrapped__() is None


@compiled
def test_a_library_beside_the_zip_file_of_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model repository for Triton's Python backend has it."""
    library = native.library_path()
    assert library
    shutil.copy(library, tmp_path)
    (tmp_path / "darktrt.zip").touch()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "darktrt.zip/darktrt/vision/native.py"))
    assert native.library_path() == tmp_path / native.FILE_NAME
    assert images.compiled_fit.__wrapped__()
