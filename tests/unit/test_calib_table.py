"""TensorRT's calibration cache: bit for bit in both directions, and one sentence for each thing that is wrong with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from darktrt.calib.histogram import Histogram
from darktrt.calib.table import CalibrationTable, parse_table
from darktrt.calib.threshold import choose_amax
from darktrt.errors import DarktrtError

CACHE = """TRT-8600-EntropyCalibration2
images: 3c010a14
(Unnamed Layer* 3) [Convolution]_output: 3d9b6bf2
model/layer: with: colons: 00800000
größe: 7f7fffff
"""


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "old.cache"
    path.write_bytes(CACHE.encode())
    table = CalibrationTable.load(path)
    assert table.version == "8600"
    assert list(table.scales) == ["images", "(Unnamed Layer* 3) [Convolution]_output", "model/layer: with: colons", "größe"]
    assert table.scales["images"] == np.float32(2048.5 / 2048 / 127)
    assert table.scales["größe"] == np.finfo(np.float32).max
    table.save(tmp_path / "new.cache")
    assert (tmp_path / "new.cache").read_bytes() == CACHE.encode()


def test_every_scale_survives() -> None:
    bits = np.random.default_rng(0).integers(1, 0x7F800000, 5000, dtype=np.uint32)
    scales = {f"t{i}": scale for i, scale in enumerate(bits.view(np.float32))}
    result = parse_table(CalibrationTable(scales, "101300").text(), "here")
    assert result.version == "101300"
    assert np.array_equal(np.array(list(result.scales.values())).view(np.uint32), bits)


@pytest.mark.parametrize("kind", ["EntropyCalibration", "MinMaxCalibration", "LegacyCalibration"])
def test_other_calibrators_are_read_and_their_kind_kept(kind: str) -> None:
    text = CACHE.replace("EntropyCalibration2", kind)
    table = parse_table(text, "here")
    assert table.calibrator == kind
    assert table.text() == text


def test_short_hex_line_ends_and_empty_lines_are_read() -> None:
    table = parse_table("TRT-8600-EntropyCalibration2\r\na: 3c010a14\r\n\r\nb: 800000\n", "here")
    assert table.scales == {"a": np.float32(2048.5 / 2048 / 127), "b": np.finfo(np.float32).tiny}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("images: 3c010a14\n", "begins with 'images: 3c010a14'"),
        ("TRT-x-EntropyCalibration2\na: 3c010a14\n", "is it a calibration cache"),
        ("TRT-8600-SomeCalibration\na: 3c010a14\n", "is it a calibration cache"),
        ("TRT-8600-EntropyCalibration2\n", "holds no scales"),
        ("TRT-8600-EntropyCalibration2\na: 3c01zz14\n", "here:2: 'a: 3c01zz14' is not"),
        ("TRT-8600-EntropyCalibration2\na: 3c010a141\n", "here:2"),
        ("TRT-8600-EntropyCalibration2\na 3c010a14\n", "here:2"),
        ("TRT-8600-EntropyCalibration2\n: 3c010a14\n", "here:2"),
        ("TRT-8600-EntropyCalibration2\nb: 3c010a14\na: 7fc00000\n", "here:3: a: the scale is nan"),
        ("TRT-8600-EntropyCalibration2\na: 7f800000\n", "the scale is inf"),
        ("TRT-8600-EntropyCalibration2\na: 00000000\nb: 0\n", "every scale is 0"),
        ("TRT-8600-EntropyCalibration2\na: 3c010a14\nb: 3c010", "here:3: ends inside the line 'b: 3c010'"),
        ("TRT-8600-EntropyCalibration2\na: 3c010a14\nb", "here:3: ends inside the line 'b'"),
        ("TRT-8XXX-EntropyCalibration2\na: 3c010a14\n", "begins with 'TRT-8XXX-EntropyCalibration2'"),
        (f"TRT-{'8' * 10}-EntropyCalibration2\na: 3c010a14\n", "is it a calibration cache"),
        ("TRT-8600-EntropyCalibration2\na: bc010a14\n", "the scale is -0.0"),
        ("TRT-8600-EntropyCalibration2\na: 3c010a14\nb: 3c010a14\na: 3c010a14\n", "here:4: tensor 'a' has a scale already"),
    ],
)
def test_wrong_text_is_named(text: str, message: str) -> None:
    with pytest.raises(DarktrtError, match=r"^here") as error:
        parse_table(text, "here")
    assert message in str(error.value)


@pytest.mark.parametrize("zero", ["00000000", "0", "80000000"])
def test_a_scale_of_zero_is_read_as_that_of_a_tensor_always_zero(zero: str) -> None:
    histogram = Histogram()
    histogram.add(np.zeros(9, np.float32))
    table = parse_table(f"TRT-8600-MinMaxCalibration\na: 3c010a14\ndead: {zero}\nb: 3d9b6bf2\n", "here")
    assert table.scales["dead"] == choose_amax(histogram, "auto").scale > 0
    assert table.scales["a"] == np.float32(2048.5 / 2048 / 127)
    assert parse_table(table.text(), "here") == table


def test_what_editors_and_tools_add_changes_nothing(tmp_path: Path) -> None:
    plain = parse_table(CACHE, "here")
    for content in (CACHE.replace("\n", "\r\n"), f"\ufeff{CACHE}", CACHE.rstrip("\n"), f"{CACHE}\n \n"):
        (tmp_path / "a").write_bytes(content.encode())
        assert CalibrationTable.load(tmp_path / "a") == plain


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(DarktrtError, match=r"a: is no UTF-8 text \(byte 0\); name a TensorRT calibration cache"):
        CalibrationTable.load(tmp_path / "a")
    with open(tmp_path / "big", "wb") as file:
        file.truncate(2 << 30)  # occupies no disk space
    with pytest.raises(DarktrtError, match="has 2,147,483,648 bytes, and such a file may have 16,777,216"):
        CalibrationTable.load(tmp_path / "big")
    with pytest.raises(DarktrtError, match="is a folder; name a file"):
        CalibrationTable.load(tmp_path)
    with pytest.raises(DarktrtError, match="No such file"):
        CalibrationTable.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("scales", "version", "message"),
    [
        ({"a": np.float32(0)}, "8600", "a: the scale is 0"),
        ({"a": np.float32(np.nan)}, "8600", "a: the scale is nan"),
        ({"a\nb": np.float32(1)}, "8600", "does not fit"),
        ({"": np.float32(1)}, "8600", "does not fit"),
        ({"a": np.float32(1)}, "8.6", "no header"),
    ],
)
def test_a_wrong_table_cannot_be_made(scales: dict[str, np.float32], version: str, message: str) -> None:
    with pytest.raises(DarktrtError, match=message):
        CalibrationTable(scales, version)


def test_a_sentence_quotes_no_more_of_a_name_than_fits_on_a_line() -> None:
    name = f"{'a' * 5000}\x1b"
    for lines in (f"{name}: 3c010a14\n{name}: 3c010a14\n", f"{name}: 7fc00000\n", f"{name}: no\n"):
        with pytest.raises(DarktrtError) as error:
            parse_table(f"TRT-8600-EntropyCalibration2\n{lines}", "here")
        assert len(str(error.value)) < 200
    with pytest.raises(DarktrtError, match=r"^tensor '\\nx{76}\.\.\.'"):
        CalibrationTable({"\n" + 5000 * "x": np.float32(1)}, "8600")


def test_comparison_with_a_network() -> None:
    table = CalibrationTable({name: np.float32(1) for name in ("b", "a", "old")}, "8600")
    assert table.compare(["a", "new", "b", "newer", "new"]) == (["new", "newer"], ["old"])
    assert table.compare(["old", "a", "b"]) == ([], [])
