"""Where each millisecond goes: the results of bench_pixels.py, lines of JSON, as a chart of stacked bars.

    python3 benchmarks/plot_pixels.py results.jsonl -o pixels.png

A bar is the work for one image, part by part, each measured alone; the black line is the time an image takes as a whole. Where
the parts follow each other, the line is at the end of the bar; where they overlap, it is at the longest part.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from darktrt.vision.charts import make_figure, save_figure

COLOURS = {
    "decode": "#9f86c0",
    "resize": "#de9454",
    "stack": "#e8c07d",
    "upload": "#bebebe",
    "copies": "#bebebe",
    "fit": "#78ac78",
    "network": "#6c94be",
    "results": "#c96567",
}
"""Of the parts, in the order of the way."""
LABELS = {"stack": "stack into a batch", "copies": "copies", "upload": "copies", "fit": "resize on the GPU"}
ROW = 44


def rows_of(path: str) -> list[dict[str, Any]]:
    """The measurements that have parts, in the file's order."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]
    return [row for row in rows if row.get("stages") and row["what"] in ("frames", "latency", "files")]


def whole_ms(row: dict[str, Any]) -> float:
    return float(row["p50"] if row["what"] == "latency" else row["ms_per_image"])


def label_of(row: dict[str, Any]) -> str:
    batch = "one at a time" if row["what"] == "latency" else f"batch {row['batch']}"
    return f"{row['what']}, {Path(row['model']).stem}\n{row['images']}, {batch}: {row['way']}"


def draw(rows: list[dict[str, Any]], output: str) -> None:
    """Two panels: all, and the short ones enlarged."""
    figure, panels = make_figure(1200, 110 + ROW * len(rows), columns=2)
    longest = max(map(whole_ms, rows))
    short = [max(whole_ms(row), sum_ms(row)) for row in rows if whole_ms(row) < longest / 5]
    for axes, limit in zip(panels, (1.15 * longest, 1.25 * max(short, default=longest)), strict=True):
        for y, row in enumerate(rows):
            _draw_row(axes, y, row, limit)
        axes.set_xlim(0, limit)
        axes.set_yticks(range(len(rows)), [label_of(row) for row in rows] if axes is panels[0] else [""] * len(rows))
        axes.invert_yaxis()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.supxlabel("milliseconds an image, on two scales; the black line is the whole")
    used = {LABELS.get(part, part): colour for part, colour in COLOURS.items() if any(row["stages"].get(part) for row in rows)}
    handles = [panels[0].barh(0, 0, color=colour, label=label) for label, colour in used.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(used), frameon=False)
    save_figure(figure, output)


def sum_ms(row: dict[str, Any]) -> float:
    return float(sum(row["stages"].get(part, 0.0) for part in COLOURS))


def _draw_row(axes: Any, y: int, row: dict[str, Any], limit: float) -> None:
    left = 0.0
    for part, colour in COLOURS.items():
        width = row["stages"].get(part, 0.0)
        axes.barh(y, width, 0.62, left, color=colour)
        left += width
    whole = whole_ms(row)
    axes.plot([whole, whole], [y - 0.42, y + 0.42], color="black", linewidth=2)
    if max(left, whole) < limit:
        axes.text(max(left, whole), y, f"  {whole:.2f}", va="center")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw where each millisecond goes.")
    parser.add_argument("results", help="lines of JSON of bench_pixels.py")
    parser.add_argument("-o", "--output", required=True, help="an image file")
    args = parser.parse_args()
    draw(rows_of(args.results), args.output)


if __name__ == "__main__":
    main()
