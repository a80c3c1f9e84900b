from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import DataError, MissingLibraryError
from dino_adapters.data import demo_tiles
from dino_adapters.data.demo_tiles import make_tiles, plan_tiles
from dino_adapters.data.source import open_source
from dino_adapters.data.splits import read_split
from dino_adapters.runtime.files import file_digest


def overlap(one: demo_tiles.Tile, other: demo_tiles.Tile) -> bool:
    return (
        abs(one.left - other.left) < (one.size + other.size) / 2
        and abs(one.top - other.top) < (one.size + other.size) / 2
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage")
    return make_tiles(tmp_path_factory.mktemp("demo") / "tiles")


class TestPlan:
    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(st.integers(1, 260), st.integers(1, 260), st.integers(16, 40))
    def test_parts_share_no_pixel(self, width: int, height: int, tile: int):
        tiles = plan_tiles("x", width, height, tile)
        counts = Counter(made.part for made in tiles)
        if tiles:
            assert counts["test"] >= demo_tiles.TEST_TILES
            assert counts["val"] >= demo_tiles.VAL_TILES
            assert counts["train"] > 0
        assert all(
            0 <= made.left <= width - tile and 0 <= made.top <= height - tile for made in tiles
        )
        assert len({made.key for made in tiles}) == len(tiles)
        fixed = [made for made in tiles if made.part != "train"]
        for one, other in itertools.chain(
            itertools.product(fixed, (made for made in tiles if made.part == "train")),
            itertools.combinations(fixed, 2),
        ):
            assert not overlap(one, other)

    def test_groups_stay_in_one_part_and_one_place(self):
        tiles = plan_tiles("x", 512, 512, 80)
        for _, members in itertools.groupby(
            sorted(tiles, key=lambda made: made.group), key=lambda made: made.group
        ):
            held = list(members)
            assert len({made.part for made in held}) == 1
            for axis in ("left", "top"):
                starts = [getattr(made, axis) for made in held]
                assert max(starts) - min(starts) < 160

    def test_small_photographs_are_left_out(self):
        assert plan_tiles("x", 451, 300, 80) == ()
        assert plan_tiles("x", 60, 60, 80) == ()


class TestMakeTiles:
    def test_numbers(self, made: Path):
        source = open_source(made, labels=made / "labels.csv")
        split = read_split(made / "split.json", keys=source.keys)
        assert sorted([*split.train, *split.val, *split.test]) == list(source.keys)
        assert len(set(source.labels.values())) >= 15
        assert 700 <= len(split.train) <= 1500
        for part, least in (("train", 30), ("val", 6), ("test", 10)):
            counts = Counter(source.labels[key] for key in getattr(split, part))
            assert set(counts) == set(source.labels.values())
            assert min(counts.values()) >= least
        assert source.groups == split.groups
        sample = source.read(split.test[0])
        assert sample.pixels.shape == (3, 80, 80)
        assert sample.pixels.dtype == np.uint8

    def test_tiles_are_cut_where_their_names_say(self, made: Path):
        photograph = np.asarray(demo_tiles._open(demo_tiles._files()["astronaut"]))
        source = open_source(made)
        for key in source.keys:
            if key.startswith("astronaut/"):
                top, left = (int(part) for part in Path(key).stem.split("_")[1:])
                expected = photograph[top : top + 80, left : left + 80].transpose(2, 0, 1)
                assert np.array_equal(source.read(key).pixels, expected)

    def test_twice_is_once_and_elsewhere_is_the_same(self, made: Path, tmp_path: Path):
        before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
        assert make_tiles(made) == made
        assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
        other = make_tiles(tmp_path / "again")
        names = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
        assert all(file_digest(made / name) == file_digest(other / name) for name in names)
        assert [path.name for path in tmp_path.iterdir()] == ["again"]

    def test_damaged_sets_are_made_again_and_foreign_files_kept(self, tmp_path: Path):
        pytest.importorskip("skimage")
        folder = make_tiles(tmp_path / "tiles", tile=100)
        lost = folder / json.loads((folder / "manifest.json").read_text())["files"][0]
        lost.unlink()
        make_tiles(folder, tile=100)
        assert lost.is_file()
        (folder / "mine.txt").write_text("keep me")
        with pytest.raises(DataError, match=r"no demo tiles, e\.g\. mine\.txt"):
            make_tiles(folder, tile=90)
        assert (folder / "mine.txt").read_text() == "keep me"
        assert lost.is_file()

    def test_refusals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        pytest.importorskip("skimage")
        with pytest.raises(DataError, match="Tiles of 400 pixels"):
            make_tiles(tmp_path / "tiles", tile=400)
        monkeypatch.setitem(demo_tiles.PHOTOGRAPHS, "cat", "skimage/data/cat.png")
        with pytest.raises(DataError, match="do not carry the photographs cat"):
            make_tiles(tmp_path / "tiles")
        monkeypatch.setitem(sys.modules, "skimage", None)
        with pytest.raises(MissingLibraryError, match=r"dino-adapters\[demo\]"):
            make_tiles(tmp_path / "tiles")
        assert list(tmp_path.iterdir()) == []
