from __future__ import annotations

from pathlib import Path

import pytest

from dino_adapters.contracts import DataError
from dino_adapters.data.labels import read_labels, read_table
from dino_adapters.runtime.console import Notices

KEYS = ("cat/1.png", "cat/2.png", "dog/1.png")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


class TestReadLabels:
    def test_none_is_no_labels(self, tmp_path: Path):
        assert read_labels(None, tmp_path, KEYS).labels == {}

    def test_folder_names(self, tmp_path: Path):
        found = read_labels("folder", tmp_path, [*KEYS, "birds/owl/7.png"])
        assert found.labels["birds/owl/7.png"] == "owl"
        assert found.labels["cat/1.png"] == "cat"

    def test_folder_names_need_folders(self, tmp_path: Path):
        with pytest.raises(DataError, match=r"1 of 2 images lie directly in .*\(e\.g\. top\.png\)"):
            read_labels("folder", tmp_path, ["top.png", "cat/1.png"])

    @pytest.mark.parametrize(
        ("place", "prefix"), [("l.csv", ""), ("lists/l.csv", "../"), ("lists/l.csv", "")]
    )
    def test_paths_from_the_root_or_from_the_table(self, tmp_path: Path, place: str, prefix: str):
        rows = "".join(f"{prefix}{key},{key[:3]},g{key[4]}\n" for key in KEYS)
        table = write(tmp_path / place, "path,label,group\n" + rows)
        found = read_labels(table, tmp_path, KEYS)
        assert found.labels == {key: key[:3] for key in KEYS}
        assert found.groups == {key: f"g{key[4]}" for key in KEYS}

    def test_gaps_are_counted(self, tmp_path: Path):
        table = write(tmp_path / "l.csv", "path,label\ncat/1.png,cat\ncat/9.png,cat\ndog/1.png,\n")
        notices = Notices()
        found = read_labels(table, tmp_path, KEYS, notices=notices)
        assert found.labels == {"cat/1.png": "cat"}
        assert notices.counts["rows of the label table without an image"] == 1
        assert notices.counts["images without a label"] == 2

    def test_contradictions_are_refused(self, tmp_path: Path):
        table = write(tmp_path / "l.csv", "path,label\ncat/1.png,cat\ncat/1.png,dog\n")
        with pytest.raises(DataError, match="labels 'cat' and 'dog'"):
            read_labels(table, tmp_path, KEYS)

    def test_a_table_of_other_images_is_refused(self, tmp_path: Path):
        table = write(tmp_path / "l.csv", "path,label\nx.png,cat\n")
        with pytest.raises(DataError, match=r"No row of .*first path: x\.png"):
            read_labels(table, tmp_path, KEYS)


class TestReadTable:
    def test_byte_order_mark_spaces_and_backslashes(self, tmp_path: Path):
        table = tmp_path / "t.csv"
        table.write_bytes(b"\xef\xbb\xbfpath, label\r\ncat\\1.png,cat\r\n")
        assert read_table(table, needed=("label",))[0]["path"] == "cat/1.png"

    def test_image_counts_as_path(self, tmp_path: Path):
        assert read_table(write(tmp_path / "t.csv", "image,split\na.png,train\n")) == [
            {"image": "a.png", "split": "train", "path": "a.png"}
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has the columns none, and not path, label"),
            ("path,kind\na,b\n", "has the columns path, kind, and not label"),
            ("path,label\na\n", "Line 2 of .* has too few columns"),
        ],
    )
    def test_refusals(self, tmp_path: Path, text: str, message: str):
        with pytest.raises(DataError, match=message):
            read_table(write(tmp_path / "t.csv", text), needed=("label",))

    def test_absent_and_binary_files(self, tmp_path: Path):
        with pytest.raises(DataError, match="There is no table"):
            read_table(tmp_path / "t.csv")
        (tmp_path / "t.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
        with pytest.raises(DataError, match="not a UTF-8 CSV table"):
            read_table(tmp_path / "t.csv")
