from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_adapters.contracts import (
    DataError,
    Sample,
    SampleSource,
    UnknownNameError,
    UnreadableFileError,
)
from dino_adapters.data.source import ImageSource, load_source, open_source
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.files import file_digest


class TestFolder:
    def test_keys_are_sorted_posix_paths(self, photos: Path):
        source = open_source(photos)
        assert source.keys == tuple(
            f"{label}/{label}{number}.png" for label in ("cat", "dog", "owl") for number in range(4)
        )
        assert len(source) == 12
        assert tuple(source) == source.keys
        assert source.path("cat/cat0.png") == photos / "cat" / "cat0.png"
        held: SampleSource = source  # the promise of contracts, checked by pyright
        assert held.digest("cat/cat0.png") == file_digest(photos / "cat" / "cat0.png")

    def test_hidden_files_are_ignored_and_others_counted(self, photos: Path):
        (photos / ".hidden.png").touch()
        (photos / ".cache").mkdir()
        (photos / ".cache" / "a.png").touch()
        (photos / "notes.txt").touch()
        (photos / "cat" / "thumbs.db").touch()
        notices = Notices()
        assert len(open_source(photos, notices=notices)) == 12
        assert list(notices.counts.values()) == [2]
        assert "notes.txt" in notices.summary()[0]

    def test_suffixes_in_capitals_are_images(self, tmp_path: Path):
        Image.new("RGB", (4, 4)).save(tmp_path / "A.JPG", "jpeg")
        assert open_source(tmp_path).read("A.JPG").pixels.shape == (3, 4, 4)

    def test_links_are_followed_once(self, photos: Path):
        (photos / "cat" / "up").symlink_to(photos, target_is_directory=True)
        (photos.parent / "more").mkdir()
        Image.new("RGB", (4, 4)).save(photos.parent / "more" / "x.png")
        (photos / "linked").symlink_to(photos.parent / "more", target_is_directory=True)
        keys = open_source(photos).keys
        assert len(keys) == 13
        assert "linked/x.png" in keys

    @pytest.mark.skipif(os.name != "posix", reason="names of bytes exist on POSIX alone")
    def test_names_that_are_no_text_are_ignored_and_said(self, photos: Path):
        (Path(os.fsdecode(os.fsencode(photos) + b"/bad\xff.png"))).touch()
        notices = Notices()
        assert len(open_source(photos, notices=notices)) == 12
        assert [what for what in notices.counts if "not UTF-8" in what]

    def test_nothing_to_read_is_refused(self, tmp_path: Path):
        with pytest.raises(DataError, match="There is no folder or table"):
            open_source(tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"No images were named: add data\.source=FOLDER"):
            open_source("give data.source=FOLDER")
        with pytest.raises(DataError, match="holds no files"):
            open_source(tmp_path)
        (tmp_path / "a.txt").touch()
        with pytest.raises(DataError, match=r"holds 1 file, but no image.*\.jpg"):
            open_source(tmp_path)
        with pytest.raises(DataError, match="is a file"):
            open_source(tmp_path / "a.txt")


class TestPatternAndTable:
    def test_pattern_keys_start_after_its_fixed_part(self, photos: Path):
        assert open_source(f"{photos}/*/*0.png").keys == (
            "cat/cat0.png",
            "dog/dog0.png",
            "owl/owl0.png",
        )
        assert len(open_source(f"{photos.parent}/**/*.png")) == 12
        with pytest.raises(DataError, match=r"The pattern .* holds no files"):
            open_source(f"{photos}/*.png")

    def test_table_with_labels_and_groups(self, photos: Path):
        (photos / "list.csv").write_text(
            "path,label,group\ndog/dog1.png,dog,a\n./cat/cat0.png,cat,b\ncat/cat0.png,cat,b\n"
        )
        notices = Notices()
        source = open_source(photos / "list.csv", notices=notices)
        assert source.keys == ("cat/cat0.png", "dog/dog1.png")
        assert source.labels == {"cat/cat0.png": "cat", "dog/dog1.png": "dog"}
        assert source.read("dog/dog1.png").group == "a"
        assert notices.counts["images listed more than once in the table, taken once"] == 1

    def test_a_table_of_a_spreadsheet(self, photos: Path):
        text = "path;label\r\ncat/cat0.png;cat\r\ndog/dog0.png;dog\r\n"
        (photos / "list.csv").write_text(text, encoding="utf-8-sig", newline="")
        notices = Notices()
        source = open_source(photos / "list.csv", notices=notices)
        assert source.labels == {"cat/cat0.png": "cat", "dog/dog0.png": "dog"}
        (line,) = notices.summary()
        assert line.startswith("tables whose cells are separated by semicolons, read as such (1×)")

    def test_absolute_rows_below_the_table(self, photos: Path):
        (photos / "list.csv").write_text(f"path,label\n{photos}/cat/cat0.png,cat\n")
        assert open_source(photos / "list.csv").labels == {"cat/cat0.png": "cat"}

    def test_table_without_labels(self, photos: Path):
        (photos / "list.csv").write_text("path\ncat/cat0.png\n")
        assert open_source(photos / "list.csv").labels == {}
        labelled = open_source(photos / "list.csv", labels="folder")
        assert labelled.labels == {"cat/cat0.png": "cat"}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("cat/gone.png", r"lists 1 files that are not there, e\.g\. cat/gone\.png"),
            ("../photos2/a.png", "not below its own folder"),
            ("/etc/a.png", "not below its own folder"),
            ("cat", "holds 1 file, but no image"),
        ],
    )
    def test_rows_that_cannot_be_used(self, photos: Path, row: str, message: str):
        (photos / "list.csv").write_text(f"path\n{row}\n")
        with pytest.raises(DataError, match=message):
            open_source(photos / "list.csv")


class TestRead:
    def test_label_and_group_come_along(self, photos: Path):
        source = open_source(photos, labels="folder")
        sample = source.read("owl/owl3.png")
        assert isinstance(sample, Sample)
        assert (sample.key, sample.label, sample.group) == ("owl/owl3.png", "owl", None)

    def test_unknown_keys_and_broken_files(self, photos: Path):
        (photos / "cat" / "cat0.png").write_bytes(b"no image")
        source = open_source(photos)
        with pytest.raises(UnknownNameError, match=r"There is no image '\.\./secret\.png'"):
            source.read("../secret.png")
        with pytest.raises(UnreadableFileError, match=r"cat/cat0\.png"):
            source.read("cat/cat0.png")

    def test_threads_read_the_same(self, photos: Path):
        source = open_source(photos)
        alone = [source.read(key).pixels for key in source]
        with ThreadPoolExecutor(4) as pool:
            together = [sample.pixels for sample in pool.map(source.read, source.keys)]
        assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))

    def test_a_recipe_says_the_same(self, photos: Path):
        recipe = DataRecipe(source=str(photos), labels="folder", value_range=(0, 10))
        source = load_source(recipe)
        assert isinstance(source, ImageSource)
        sample = source.read("cat/cat0.png")
        assert (sample.label, sample.bands[0].high) == ("cat", 10.0)


def test_the_room_opens_without_torch():
    code = "import sys, dino_adapters.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
