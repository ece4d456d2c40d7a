"""What DATA can be: folders, lists, COCO files, patterns; what is said when it holds nothing; samples in its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Made, files_in, made_image
from PIL import Image

from darktrt.calib.data import batches, find_images, flips_and_crops, path_of
from darktrt.errors import DarktrtError
from darktrt.vision.images import read_image


@pytest.fixture
def shots(folder: Path) -> Path:
    """``shots/`` in the current folder with images (empty files: nothing is read here) and other things."""
    root = Path("shots")
    for name in ["b.jpg", "a.PNG", "deep/er/c.jpeg", "d.txt", ".hidden.jpg", ".cache/e.jpg", "deep/f.mp4"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


ALL = ["shots/a.PNG", "shots/b.jpg", "shots/deep/er/c.jpeg"]


def found(*data: str | Path, limit: int | None = None, seed: int = 0) -> list[str]:
    return [str(path) for path in find_images(data, limit, seed)]


def test_folder_is_searched_and_hidden_things_are_not(shots: Path) -> None:
    assert found(shots) == ALL
    hidden = shots.rename(".shots")
    assert len(found(hidden)) == 3


def test_image_pattern_and_overlap(shots: Path) -> None:
    assert found("shots/b.jpg") == ["shots/b.jpg"]
    assert found("shots/*.[jP]*") == ALL[:2]
    assert found("shots/**/*.jp*g") == ALL[1:]
    assert found("shots/b.jpg", shots.resolve(), "shots")[2:] == ["shots/b.jpg"]  # each as it was named first


def test_list_file(shots: Path) -> None:
    absolute = (shots / "a.PNG").resolve()
    Path("lists").mkdir()
    Path("lists/train.txt").write_text(f"\ufeff../shots/b.jpg\r\n\r\n# old: x.jpg\r\n{absolute}\r\n", encoding="utf-8")
    assert {Path(p).resolve() for p in found("lists/train.txt")} == {(shots / "b.jpg").resolve(), absolute}


def coco(path: str, *names: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"images": [{"id": i, "file_name": name} for i, name in enumerate(names)]}))
    return path


@pytest.mark.parametrize(
    "path", ["shots/x.json", "shots.json", "annotations/shots.json", "annotations/instances_shots.json", "instances_shots.json"]
)
def test_coco_file_finds_its_images(shots: Path, path: str) -> None:
    assert {Path(p).resolve() for p in found(coco(path, "b.jpg", "a.PNG"))} == {
        (shots / n).resolve() for n in ("a.PNG", "b.jpg")
    }


def test_coco_file_with_its_folder(shots: Path) -> None:
    path = coco("far/away/x.json", "deep/er/c.jpeg", "b.jpg")
    assert found(f"{path}:shots") == ALL[1:]
    with pytest.raises(DarktrtError, match=r"'deep/er/c.jpeg' is not in .*name the images' folder as far/away/x.json:FOLDER"):
        found(path)
    with pytest.raises(DarktrtError, match="is not in 'shots/deep'"):
        found(f"{path}:shots/deep")


def test_sample_depends_on_the_seed_alone(folder: Path) -> None:
    for i in range(60):
        Path(f"{i}.jpg").touch()
    first = found(".", limit=20, seed=1)
    assert first == sorted(first)
    assert len(set(first)) == 20
    assert found("*.jpg", ".", limit=20, seed=1) == first
    assert found(".", limit=20, seed=2) != first
    assert len(found(".", limit=60)) == len(found(".", limit=99)) == 60


def test_nothing_there_is_said(shots: Path) -> None:
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n")
    Path("bytes.bin").write_bytes(b"\xff\xfe\xfa")
    Path("notes.txt").write_text("hello\n")
    Path("broken.json").write_text("{")
    Path("other.json").write_text("[1]")
    cases = {
        "empty": "empty: no images here",
        "empty.txt": "no images here",
        "shots/*.bmp": "no images here",
        coco("none.json"): "no images here",
        "none": "none: no such file or folder",
        "bytes.bin": "neither an image nor a list",
        "notes.txt": "lists 'hello', which is no image",
        "broken.json": "is no COCO file",
        "other.json": "is no COCO file",
        "missing.json:shots": "No such file",
        "x" * 300: "cannot be read",
    }
    for entry, message in cases.items():
        with pytest.raises(DarktrtError, match=message):
            found(entry, "shots")
    with pytest.raises(DarktrtError, match="no images to calibrate on"):
        found()
    with pytest.raises(DarktrtError, match="limit is 0"):
        found("shots", limit=0)


def test_path_of_an_entry() -> None:
    assert [str(path_of(entry)) for entry in ("a/b.json:c/d", "a/b.json", "shots/*.png", "x.txt")] == [
        "a/b.json",
        "a/b.json",
        "shots/*.png",
        "x.txt",
    ]


# --- batches for TensorRT's own calibration ---


def test_batches_are_all_inputs_of_the_model(made: Made, folder: Path) -> None:
    """One image at a time where the batch is open; a static one is filled up; thresholds only where they are inputs."""
    images = [folder / f"{i}.png" for i in range(4)]
    for i, path in enumerate(images):
        Image.fromarray(made_image(64, 96, seed=i)).save(path)
    info = replace(made.info, head="nms", input="uint8", batch=(1, 8, 8))
    fed = list(batches(images, info))
    assert [one["images"].shape for one in fed] == [(1, 64, 96, 3)] * 4
    assert set(fed[0]) == {"images", "score_threshold", "iou_threshold"}
    (first, second) = batches(images, replace(info, batch=(3, 3, 3), fixed_thresholds=(0.25, 0.45)))
    assert set(first) == {"images"}
    assert np.array_equal(second["images"], np.concatenate([fed[i]["images"] for i in (3, 0, 1)]))
    letterboxed = replace(info, resize="letterbox", nms=replace(info.nms, kind="diounms"))
    assert next(batches(images, letterboxed))["image_size"].tolist() == [[96, 64]]


# --- samples ---


def test_flips_and_crops_are_twelve_of_each_image(folder: Path) -> None:
    for i, name in enumerate(("a.png", "b.png")):
        Image.fromarray(made_image(90, 121, seed=i)).save(name)
    Path("out").mkdir()
    made = flips_and_crops([Path("a.png"), Path("b.png")], Path("out"))
    assert len(made) == 24
    assert sorted(str(path.relative_to("out")) for path in made) == files_in(folder / "out")
    assert len({path.read_bytes() for path in made}) == 24
    image, whole, mirrored, corner = (
        read_image(path).astype(int)
        for path in ("a.png", "out/a-whole.jpg", "out/a-whole-mirrored.jpg", "out/a-se-mirrored.jpg")
    )
    for found, expected in ((whole, image), (mirrored, image[:, ::-1]), (corner, image[-60:, -81:][:, ::-1])):
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 3  # what JPEG loses


def test_flips_and_crops_are_the_same_each_time(folder: Path) -> None:
    Image.fromarray(made_image(64, 80)).save("a.png")
    contents = []
    for _ in range(2):
        contents.append([path.read_bytes() for path in flips_and_crops([Path("a.png")], Path())])
    assert contents[0] == contents[1]
