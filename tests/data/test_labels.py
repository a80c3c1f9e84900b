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
        assert notices.summary() == (
            "1 of 3 rows of the label table have no image (1×): cat/9.png",
            "2 of 3 images have no label (2×): cat/2.png, dog/1.png",
        )

    def test_contradictions_are_refused(self, tmp_path: Path):
        table = write(tmp_path / "l.csv", "path,label\ncat/1.png,cat\ncat/1.png,dog\n")
        with pytest.raises(DataError, match="labels 'cat' and 'dog'"):
            read_labels(table, tmp_path, KEYS)

    def test_a_table_of_other_images_is_refused(self, tmp_path: Path):
        table = write(tmp_path / "l.csv", "path,label\nx.png,cat\n")
        with pytest.raises(DataError, match=r"table says 'x\.png', .*folder holds 'cat/1\.png'"):
            read_labels(table, tmp_path, KEYS)

    def test_tables_without_a_label_are_refused(self, tmp_path: Path):
        with pytest.raises(DataError, match="a header and no rows"):
            read_labels(write(tmp_path / "l.csv", "path,label\n"), tmp_path, KEYS)
        with pytest.raises(DataError, match="Fill the column label"):
            read_labels(write(tmp_path / "l.csv", "path,label\ncat/1.png, \n"), tmp_path, KEYS)

    @pytest.mark.parametrize("prefix", ["photos/", "./photos/", "", "{root}/", "{link}/"])
    @pytest.mark.parametrize("where", ["absolute", "relative", "link"])
    def test_a_table_beside_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, where: str
    ):
        root = tmp_path / "photos"
        for key in KEYS:
            write(root / key, "")
        link = tmp_path / "link"
        link.symlink_to(root, target_is_directory=True)
        start = prefix.format(root=root, link=link)
        write(tmp_path / "l.csv", "path,label\n" + "".join(f"{start}{k},{k[:3]}\n" for k in KEYS))
        monkeypatch.chdir(tmp_path)
        table, given = {
            "absolute": (tmp_path / "l.csv", root),
            "relative": (Path("l.csv"), Path("photos")),
            "link": (Path("l.csv"), Path("link")),
        }[where]
        assert read_labels(table, given, KEYS).labels == {key: key[:3] for key in KEYS}

    def test_a_folder_whose_name_begins_alike_is_another(self, tmp_path: Path):
        table = write(tmp_path / "l.csv", "path,label\nphotos2/cat/1.png,cat\n")
        with pytest.raises(DataError, match="No row of"):
            read_labels(table, tmp_path / "photos", KEYS)


class TestReadTable:
    def test_byte_order_mark_spaces_and_backslashes(self, tmp_path: Path):
        table = tmp_path / "t.csv"
        table.write_bytes(b"\xef\xbb\xbfpath, label\r\ncat\\1.png,cat\r\n")
        assert read_table(table, needed=("label",))[0]["path"] == "cat/1.png"

    @pytest.mark.parametrize("mark", [",", ";", "\t"])
    @pytest.mark.parametrize("start", ["", "\ufeff"])
    @pytest.mark.parametrize("quote", ["", '"'])
    def test_separators_of_spreadsheets(self, tmp_path: Path, mark: str, start: str, quote: str):
        lines = (("path", "label"), ("a.png", "x, y" if mark != "," else "x"))
        text = "\r\n".join(mark.join(f"{quote}{cell}{quote}" for cell in line) for line in lines)
        notices = Notices()
        table = write(tmp_path / "t.csv", start + text)
        for _ in range(2):
            rows = read_table(table, needed=("label",), notices=notices)
            assert rows == [{"path": "a.png", "label": lines[1][1]}]
        assert sum(notices.counts.values()) == (mark != ",")

    def test_semicolons_in_a_table_of_commas_stay(self, tmp_path: Path):
        table = write(tmp_path / "t.csv", "path,note;more\na.png,b;c\n")
        assert read_table(table) == [{"path": "a.png", "note;more": "b;c"}]

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
