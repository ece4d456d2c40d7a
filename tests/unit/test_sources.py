"""What DATA can be: folders, lists, COCO files, patterns; what is said when it holds nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from darktrt.errors import DarktrtError
from darktrt.vision.sources import find_images, path_of


@pytest.fixture
def shots(folder: Path) -> Path:
    """``shots/`` in the current folder with images (empty files: nothing is read here) and other things."""
    root = Path("shots")
    for name in ["b.jpg", "a.PNG", "deep/er/c.jpeg", "d.txt", ".hidden.jpg", ".cache/e.jpg", "deep/f.mp4"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


ALL = ["shots/a.PNG", "shots/b.jpg", "shots/deep/er/c.jpeg"]


def paths_of(*data: str | Path, limit: int | None = None, seed: int = 0) -> list[str]:
    return [str(path) for path in find_images(data, limit, seed)]


def test_folder_is_searched_and_hidden_things_are_not(shots: Path) -> None:
    assert paths_of(shots) == ALL
    hidden = shots.rename(".shots")
    assert len(paths_of(hidden)) == 3


def test_image_pattern_and_overlap(shots: Path) -> None:
    assert paths_of("shots/b.jpg") == ["shots/b.jpg"]
    assert paths_of("shots/*.[jP]*") == ALL[:2]
    assert paths_of("shots/**/*.jp*g") == ALL[1:]
    assert paths_of("shots/b.jpg", shots.resolve(), "shots")[2:] == ["shots/b.jpg"]  # each as it was named first


def test_list_file(shots: Path) -> None:
    absolute = (shots / "a.PNG").resolve()
    Path("lists").mkdir()
    Path("lists/train.txt").write_text(f"\ufeff../shots/b.jpg\r\n\r\n# old: x.jpg\r\n{absolute}\r\n", encoding="utf-8")
    assert {Path(p).resolve() for p in paths_of("lists/train.txt")} == {(shots / "b.jpg").resolve(), absolute}


def coco(path: str, *names: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"images": [{"id": i, "file_name": name} for i, name in enumerate(names)]}))
    return path


@pytest.mark.parametrize(
    "path", ["shots/x.json", "shots.json", "annotations/shots.json", "annotations/instances_shots.json", "instances_shots.json"]
)
def test_coco_file_finds_its_images(shots: Path, path: str) -> None:
    assert {Path(p).resolve() for p in paths_of(coco(path, "b.jpg", "a.PNG"))} == {
        (shots / n).resolve() for n in ("a.PNG", "b.jpg")
    }


def test_coco_file_with_its_folder(shots: Path) -> None:
    path = coco("far/away/x.json", "deep/er/c.jpeg", "b.jpg")
    assert paths_of(f"{path}:shots") == ALL[1:]
    with pytest.raises(DarktrtError, match=r"'deep/er/c.jpeg' is not in .*name the images' folder as far/away/x.json:FOLDER"):
        paths_of(path)
    with pytest.raises(DarktrtError, match="is not in 'shots/deep'"):
        paths_of(f"{path}:shots/deep")


def test_sample_depends_on_the_seed_alone(folder: Path) -> None:
    for i in range(60):
        Path(f"{i}.jpg").touch()
    first = paths_of(".", limit=20, seed=1)
    assert first == sorted(first)
    assert len(set(first)) == 20
    assert paths_of("*.jpg", ".", limit=20, seed=1) == first
    assert paths_of(".", limit=20, seed=2) != first
    assert len(paths_of(".", limit=1)) == 1
    assert len(paths_of(".", limit=60)) == len(paths_of(".", limit=99)) == 60


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
        "bytes.bin": "should be an image, or a list of images",
        "notes.txt": "lists 'hello', which is no image",
        "broken.json": "a COCO file has images",
        "other.json": "a COCO file has images",
        "missing.json:shots": "No such file",
        "x" * 300: "cannot be read",
    }
    for entry, message in cases.items():
        with pytest.raises(DarktrtError, match=message):
            paths_of(entry, "shots")
    with pytest.raises(DarktrtError, match="there are no images; name a folder"):
        paths_of()
    with pytest.raises(DarktrtError, match="limit is 0"):
        paths_of("shots", limit=0)


def test_path_of_an_entry() -> None:
    assert [str(path_of(entry)) for entry in ("a/b.json:c/d", "a/b.json", "shots/*.png", "x.txt")] == [
        "a/b.json",
        "a/b.json",
        "shots/*.png",
        "x.txt",
    ]
