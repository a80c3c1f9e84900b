from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_adapters.contracts import DataError
from dino_adapters.data import audit
from dino_adapters.data.advice import MOST_UNREADABLE
from dino_adapters.data.audit import inspect
from dino_adapters.data.source import open_source
from dino_adapters.recipes.data import DataRecipe


def said(found: audit.Inspection, word: str) -> list[str]:
    return [sentence for sentence in found.suggestions if word in sentence]


@pytest.fixture
def smooth(tmp_path: Path, chance: np.random.Generator) -> Path:
    """Twelve different smooth pictures, as photographs are."""
    (tmp_path / "set").mkdir()
    for number in range(12):
        coarse = Image.fromarray(chance.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((120, 100), Image.Resampling.BICUBIC).save(
            tmp_path / "set" / f"{number:02d}.png"
        )
    return tmp_path / "set"


def test_counts_and_sizes(photos: Path):
    found = inspect(open_source(photos, labels="folder"))
    assert found.source == "photos"
    assert found.count == 12
    assert found.sizes == (("32 x 24", 12),)
    assert (found.smallest_side, found.median_side) == (24, 24.0)
    assert found.dtypes == {"uint8": 12}
    assert found.bands == {"red, green, blue": 12}
    assert found.classes == {"cat": 4, "dog": 4, "owl": 4}
    assert (found.exact_count, found.near_count, found.unreadable) == (0, 0, ())
    assert found.ranges["uint8"][0] >= 0
    assert found.ranges["uint8"][1] <= 255


def test_result_is_json_and_independent_of_threads(photos: Path):
    one, four = (inspect(open_source(photos), workers=workers) for workers in (1, 4))
    assert one == four
    again = json.loads(json.dumps(one.as_json(), allow_nan=False))
    assert again["count"] == 12


def test_unreadable_files_are_named_with_the_reason(photos: Path):
    (photos / "cat" / "cat1.png").write_bytes(b"<html>")
    found = inspect(open_source(photos))
    assert [key for key, _ in found.unreadable] == ["cat/cat1.png"]
    assert found.unreadable[0][1].startswith("cat/cat1.png is text, not an image")
    assert said(found, "1 of 12 images cannot be used (cat/cat1.png); a run that meets")


def test_more_unreadable_files_than_runs_allow(photos: Path):
    for number in range(4):
        (photos / "cat" / f"cat{number}.png").write_bytes(b"")
    found = inspect(open_source(photos))
    (sentence,) = said(found, "4 of 12 images cannot be used")
    assert "cat/cat2.png and 1 more" in sentence
    assert "33 %. Runs stop above 10 %" in sentence
    assert "data.max_unreadable=0.34" in sentence
    assert DataRecipe(source="x").max_unreadable == MOST_UNREADABLE


def test_only_unreadable_files_are_refused(tmp_path: Path):
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="None of the 1 images"):
        inspect(open_source(tmp_path))


class TestDuplicates:
    def test_copies_are_exact_and_not_near(self, smooth: Path):
        shutil.copy(smooth / "03.png", smooth / "copy.png")
        found = inspect(open_source(smooth))
        assert found.exact == (("03.png", "copy.png"),)
        assert found.near == ()
        assert said(found, "byte for byte")

    @pytest.mark.parametrize("change", ["jpeg", "smaller", "brighter"])
    def test_changed_copies_are_near(self, smooth: Path, change: str):
        with Image.open(smooth / "05.png") as image:
            if change == "smaller":
                image.resize((90, 75), Image.Resampling.BICUBIC).save(smooth / "x.png")
            elif change == "brighter":
                image.point(lambda value: value * 0.8 + 20).save(smooth / "x.png")
            else:
                image.save(smooth / "x.jpg", quality=70)
        found = inspect(open_source(smooth))
        assert len(found.near) == found.near_count == 1
        assert found.near[0][0] == "05.png"
        assert found.exact == ()

    def test_different_pictures_are_not(self, smooth: Path):
        assert inspect(open_source(smooth)).near == ()

    def test_plain_pictures_are_not_near(self, tmp_path: Path):
        for value in (0, 100, 255):
            Image.new("RGB", (20, 20), (value, value, value)).save(tmp_path / f"{value}.png")
        assert inspect(open_source(tmp_path)).near == ()

    def test_long_lists_are_cut_and_counted(self, smooth: Path):
        for number in range(5):
            shutil.copy(smooth / f"{number:02d}.png", smooth / f"copy{number}.png")
        found = inspect(open_source(smooth), max_pairs=2)
        assert (len(found.exact), found.exact_count) == (2, 5)

    def test_pairs_equal_the_slow_search(self, chance: np.random.Generator, monkeypatch):
        picture = chance.normal(size=(16, 16)).astype(np.float16)
        hashes = [int(chance.integers(0, 16)) for _ in range(700)]  # more than one block
        looks = [
            audit.Look(f"{at:03d}", digest=str(at), thumbnail=picture, gradient=value << 60)
            for at, value in enumerate(hashes)
        ]
        monkeypatch.setattr(audit, "HAMMING", 1)
        expected = [
            (f"{first:03d}", f"{second:03d}")
            for first in range(700)
            for second in range(first + 1, 700)
            if (hashes[first] ^ hashes[second]).bit_count() <= 1
        ]
        assert sorted(audit._near(looks)) == expected


class TestSuggestions:
    def test_sixteen_bits_ask_for_a_range(self, tmp_path: Path):
        Image.fromarray(np.array([[3, 4000]] * 9, np.uint16)).save(tmp_path / "a.png")
        found = inspect(open_source(tmp_path))
        (sentence,) = said(found, "values from 3 to 4000")
        assert "data.value_range=[0,4095] for 12-bit, [0,10000] for reflectance" in sentence
        assert "--value-range 0,4095" in sentence
        assert said(found, "side below 16 pixels")
        assert found.ranges == {"uint16": (3.0, 4000.0)}
        assert not said(inspect(open_source(tmp_path, value_range=(0, 4095))), "value_range")

    def test_nameless_channels_ask_for_names(self, tmp_path: Path, save_tiff):
        save_tiff(tmp_path / "a.tif", np.ones((4, 20, 20), np.uint8))
        (sentence,) = said(inspect(open_source(tmp_path)), "Files with 4 channels")
        assert "called band1 to band4 unless you do" in sentence
        assert "data.bands=[...] with 4 names" in sentence
        assert "--bands" in sentence

    def test_mixed_bands_are_said(self, photos: Path):
        Image.new("L", (20, 20)).save(photos / "grey.png")
        assert said(inspect(open_source(photos)), "differ in their bands")

    def test_class_folders_are_offered(self, photos: Path):
        assert said(inspect(open_source(photos)), "data.labels=folder")
        assert not said(inspect(open_source(photos, labels="folder")), "data.labels=folder")

    def test_one_class_is_too_few(self, photos: Path):
        found = inspect(open_source(f"{photos}/cat*/*.png", labels="folder"))
        assert said(found, "only one class (cat): fit, evaluate and start need two classes")
        assert not said(inspect(open_source(photos, labels="folder")), "only one class")

    def test_single_images_are_never_tested(self, photos: Path):
        for number in range(1, 4):
            (photos / "owl" / f"owl{number}.png").unlink()
        found = inspect(open_source(photos, labels="folder"))
        assert said(found, "The class owl has a single image: it can only train, it is never")
        for number in range(1, 4):
            (photos / "dog" / f"dog{number}.png").unlink()
        found = inspect(open_source(photos, labels="folder"))
        assert said(found, "2 classes have a single image (dog, owl)")

    def test_long_tails_are_said(self, photos: Path, chance: np.random.Generator):
        for number in range(4, 45):
            pixels = chance.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / "cat" / f"{number}.png")
        found = inspect(open_source(photos, labels="folder"))
        assert next(iter(found.classes)) == "cat"
        assert said(found, "long-tailed (45 to 4 images; rare: dog, owl)")
        assert said(found, "No groups were given")

    def test_large_images_and_holes(self, tmp_path: Path):
        pixels = np.full((400, 500, 4), 255, np.uint8)
        pixels[:200, :, 3] = 0
        Image.fromarray(pixels).save(tmp_path / "a.png")
        found = inspect(open_source(tmp_path))
        assert found.invalid_share == 0.5
        assert said(found, "data.image_size=256")
