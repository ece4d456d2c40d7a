"""Which cfgs of public repositories darktrt converts, and with which sentence it refuses the others: a table in Markdown.

    python benchmarks/list_cfgs.py cfgs -o benchmarks/networks.md
    python benchmarks/list_cfgs.py cfgs --export -o benchmarks/networks.md

The folder holds OWNER/REPOSITORY/... (or REPOSITORY@BRANCH), as checkouts of the repositories lie there. Files of the same
content, line ends aside, count once, in the first repository that has them. A cfg is a detector if it has a head: [yolo],
[Gaussian_yolo], [region] or [detection]. Converted means that the cfg is read, the shapes of its layers are inferred, and its
network and metadata are built; with --export, that `darktrt convert --random-weights 0` writes its ONNX file, which takes far
longer. A cfg that is refused for its own size is tried with `--size 512`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import darktrt
from darktrt.convert.cfg import read_cfg
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, scratch_folder
from darktrt.progress import progress, set_progress

HEADS = "yolo", "Gaussian_yolo", "region", "detection"
FIRST = "AlexeyAB/darknet", "pjreddie/darknet"
"""Repositories that others copied from: a cfg that they have is listed as theirs."""
CONVERTED = "converted"
OTHER_SIZE = 512, 512


@dataclass(frozen=True)
class Cfg:
    repository: str
    path: Path
    name: str
    """Its path in the repository."""
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    cfg: Cfg
    sentence: str
    """Why it is refused; empty if it converts."""
    at_other_size: bool = False
    """Whether it converts at OTHER_SIZE."""

    @property
    def converts(self) -> bool:
        return not self.sentence or self.at_other_size

    @property
    def words(self) -> str:
        if self.at_other_size:
            return f"{CONVERTED} at {OTHER_SIZE[0]}x{OTHER_SIZE[1]}; at its own size: {self.sentence}"
        return self.sentence or CONVERTED


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    set_progress("bar")
    try:
        files = list(found(args.folder))
        results = [result_of(cfg, args.export) for cfg in progress_over(detectors(files))]
        with atomic_output(args.output) as temporary:
            Path(temporary).write_text(markdown(files, results, args.export), encoding="utf-8")
    except DarktrtError as error:
        sys.exit(f"list_cfgs: {error}")
    print(f"{args.output}: {len(results)} detectors, {sum(result.converts for result in results)} {CONVERTED}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder of OWNER/REPOSITORY/... with cfgs in them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the Markdown file to write")
    parser.add_argument("--export", action="store_true", help="write the ONNX file of each, with random weights, too")
    return parser.parse_args(arguments)


def progress_over(cfgs: list[Cfg]) -> Iterator[Cfg]:
    with progress(len(cfgs), "cfg", "cfgs") as bar:
        for cfg in cfgs:
            yield cfg
            bar.update(1)


# --- the cfgs ---


def found(folder: Path) -> Iterator[Cfg]:
    """Every darknet cfg below the folder, those of FIRST first; files without a [net] section are none."""
    repositories = sorted(path for path in folder.glob("*/*") if path.is_dir())
    if not repositories:
        raise DarktrtError(f"{folder}: has no folder OWNER/REPOSITORY; put checkouts of the repositories there", "folder")
    names = {f"{path.parent.name}/{path.name}": path for path in repositories}
    for name in sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name.lower())):
        for path in sorted(names[name].rglob("*.cfg"), key=lambda path: (len(path.parts), path)):
            sections = re.findall(r"^\s*\[\s*(\w+)\s*\]", text_of(path), re.MULTILINE)
            if {"net", "network"} & set(sections):
                yield Cfg(name, path, str(path.relative_to(names[name])), tuple(s for s in sections if s in HEADS))


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")


def different(files: Sequence[Cfg]) -> list[Cfg]:
    first = {hashlib.sha256(text_of(cfg.path).encode()).digest(): cfg for cfg in reversed(files)}
    return [cfg for cfg in files if cfg in first.values()]


def detectors(files: Sequence[Cfg]) -> list[Cfg]:
    return [cfg for cfg in different(files) if cfg.heads]


def result_of(cfg: Cfg, export: bool) -> Result:
    sentence = refusal(cfg.path, None, export)
    return Result(cfg, sentence, bool(sentence) and not refusal(cfg.path, OTHER_SIZE, export))


def refusal(path: Path, size: tuple[int, int] | None, export: bool) -> str:
    """Why darktrt refuses a cfg, without the path; empty if it converts it."""
    try:
        if export:
            with scratch_folder() as folder:
                darktrt.convert_darknet(path, None, folder / "plain.onnx", size=size, random_weights=0)
        else:
            build(path, size)
    except DarktrtError as error:
        return re.sub(r"^(\d+): ", r"line \1: ", str(error).replace(f"{path}:", "", 1).strip())
    return ""


def build(path: Path, size: tuple[int, int] | None) -> None:
    """All that a conversion refuses a cfg for. The weights are not made: their memory is not touched."""
    import torch

    from darktrt.convert.export import class_names, detector_info
    from darktrt.convert.model import Darknet

    network = read_cfg(path)
    network = network.resized(*size) if size else network
    with torch.device("meta"):
        Darknet(network)
    detector_info(network, (1, 1, 1), class_names(network, None), {})


# --- the table ---


def markdown(files: Sequence[Cfg], results: Sequence[Result], export: bool) -> str:
    command = f"python benchmarks/list_cfgs.py cfgs{' --export' if export else ''} -o benchmarks/networks.md"
    return "\n".join(
        [
            "# Public detectors by result",
            "",
            *summary(files, results),
            f"Made by `{command}` of darktrt {version('darktrt')} on {date.today().isoformat()}.",
            "Its text says what counts as what.",
            "",
            *by_repository(files, results),
            "",
            *by_head(results),
            "",
            *by_sentence(results),
            "",
            "## All",
            "",
            *table(("repository", "cfg", "heads", "result"), [row(result) for result in results]),
            "",
        ]
    )


def summary(files: Sequence[Cfg], results: Sequence[Result]) -> Iterator[str]:
    repositories, converted = len({cfg.repository for cfg in files}), sum(result.converts for result in results)
    yield f"Of {len(different(files))} different darknet cfgs ({len(files)} files) of {repositories} public repositories,"
    yield f"{len(results)} are detectors. darktrt converts {converted} of them and refuses {len(results) - converted} by name."


def by_repository(files: Sequence[Cfg], results: Sequence[Result]) -> Iterator[str]:
    whole, once = Counter(cfg.repository for cfg in files), Counter(cfg.repository for cfg in different(files))
    heads = Counter(result.cfg.repository for result in results)
    good = Counter(result.cfg.repository for result in results if result.converts)
    rows = [(name, n, once[name], heads[name], good[name], heads[name] - good[name]) for name, n in whole.items()]
    total = ("all", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True)))
    yield from table(("repository", "cfgs", "not seen before", "detectors", CONVERTED, "refused"), [*rows, total])


def by_head(results: Sequence[Result]) -> Iterator[str]:
    kinds = Counter(result.cfg.heads[0] for result in results)
    good = Counter(result.cfg.heads[0] for result in results if result.converts)
    yield from table(
        ("head", "detectors", CONVERTED, "refused"), [(f"[{k}]", n, good[k], n - good[k]) for k, n in kinds.items()]
    )


def by_sentence(results: Sequence[Result]) -> Iterator[str]:
    """Refusals that differ in numbers only are one."""
    kinds = Counter(
        re.sub(r"(?<![A-Za-wyz0-9])\d[\d.]*", "N", result.sentence.removeprefix("line "))
        for result in results
        if not result.converts
    )
    rows = [(n, sentence.removeprefix("N: ")) for sentence, n in kinds.most_common()]
    yield from table(("refused", "sentence (N: a number)"), rows)


def row(result: Result) -> tuple[str, str, str, str]:
    heads = ", ".join(f"{n} [{kind}]" if n > 1 else f"[{kind}]" for kind, n in Counter(result.cfg.heads).items())
    return result.cfg.repository, result.cfg.name, heads, result.words


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    for cells in (titles, ["---"] * len(titles), *rows):
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    main()
