import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import DataError, FeatureSpec, RunFolderError, ShapeError
from dino_adapters.features import store as store_module
from dino_adapters.features.store import FeatureStore, store_name

SPEC = FeatureSpec("abc", ("red", "green", "blue"), 16)
WIDTH, GRID = 4, (2, 2)


class Killed(BaseException):
    pass


def fresh(parent: Path, spec: FeatureSpec = SPEC) -> FeatureStore:
    return FeatureStore.prepare(parent, spec, embed_dim=WIDTH, grid=GRID)


def rows(seed: int, count: int):
    rng = np.random.default_rng(seed)
    cls, mean = rng.normal(size=(2, count, WIDTH)).astype(np.float32)
    return cls, mean, rng.normal(size=(count, 4, WIDTH)).astype(np.float32)


def fill(store: FeatureStore, keys: list[str], seed: int = 0, *, patches: bool = False) -> dict:
    cls, mean, tokens = rows(seed, len(keys))
    with store.writing():
        store.append({k: f"d-{k}" for k in keys}, cls, mean, tokens if patches else None)
    return {k: (cls[i], mean[i], tokens[i]) for i, k in enumerate(keys)}


def kill_before_manifest(monkeypatch, store: FeatureStore, keys: list[str]) -> None:
    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_write_manifest", die)
        with pytest.raises(Killed):
            fill(store, keys)


class TestReading:
    @settings(deadline=None, derandomize=True, max_examples=25)
    @given(st.data())
    def test_rows_come_in_the_order_asked_whatever_the_shards(self, data):
        names = [f"k{i}" for i in range(data.draw(st.integers(1, 12)))]
        expected: dict = {}
        with tempfile.TemporaryDirectory() as folder:
            store, left, seed = fresh(Path(folder)), list(names), 0
            while left:
                count = data.draw(st.integers(1, len(left)))
                expected |= fill(store, left[:count], seed, patches=True)
                left, seed = left[count:], seed + 1
            asked = data.draw(st.lists(st.sampled_from(names), max_size=20))
            for opened in (store, FeatureStore(store.folder)):
                found = opened.read(asked, patches=True)
                assert found.keys == tuple(asked)
                assert found.cls.shape == (len(asked), WIDTH)
                assert found.patches is not None
                for row, key in enumerate(asked):
                    assert np.array_equal(found.cls[row], expected[key][0])
                    assert np.array_equal(found.mean[row], expected[key][1])
                    assert np.array_equal(found.patches[row], expected[key][2].astype(np.float16))

    def test_patches_are_float16_and_only_read_when_asked_for(self, tmp_path):
        store = fresh(tmp_path)
        fill(store, ["a"], patches=True)
        assert store.read(["a"]).patches is None
        tokens = store.read(["a"], patches=True).patches
        assert tokens is not None
        assert tokens.dtype == np.float16

    def test_an_absent_key_is_named(self, tmp_path):
        store = fresh(tmp_path)
        fill(store, ["a"])
        with pytest.raises(DataError, match=r"1 of 2 images.*'b'"):
            store.read(["a", "b"])

    def test_absent_patches_are_named(self, tmp_path):
        store = fresh(tmp_path)
        fill(store, ["a"])
        with pytest.raises(DataError, match="without patch tokens"):
            store.read(["a"], patches=True)

    def test_pickled_arrays_are_refused(self, tmp_path):
        store = fresh(tmp_path)
        fill(store, ["a"])
        path = store.folder / "vectors-000000.npy"
        np.save(path, np.array([{"danger": 1}], dtype=object), allow_pickle=True)
        manifest = json.loads((store.folder / "manifest.json").read_text())
        manifest["shards"][0]["bytes"] = [path.stat().st_size]
        (store.folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="objects"):
            FeatureStore(store.folder).read(["a"])

    def test_a_folder_without_manifest_is_no_store(self, tmp_path):
        with pytest.raises(DataError, match="no feature store"):
            FeatureStore(tmp_path)

    def test_a_manifest_of_another_format_is_refused(self, tmp_path):
        (tmp_path / "manifest.json").write_text('{"format": 99}')
        with pytest.raises(DataError, match="format 1"):
            FeatureStore(tmp_path)


class TestMissing:
    def test_new_changed_and_unchanged_files(self, tmp_path):
        store = fresh(tmp_path)
        fill(store, ["a", "b"])
        assert store.missing({"b": "d-b", "a": "other", "c": "d-c"}) == ("a", "c")

    def test_a_later_row_replaces_the_earlier_one(self, tmp_path):
        store = fresh(tmp_path)
        fill(store, ["a", "b"], seed=1)
        newer = fill(store, ["a"], seed=2)
        for opened in (store, FeatureStore(store.folder)):
            assert np.array_equal(opened.read(["a"]).cls[0], newer["a"][0])
            assert opened.keys == ("a", "b")

    def test_vectors_without_patches_are_missing_once_patches_are_wanted(self, tmp_path):
        store = fresh(tmp_path)
        fill(store, ["a"])
        assert store.missing({"a": "d-a"}) == ()
        assert store.missing({"a": "d-a"}, patches=True) == ("a",)

    def test_dropped_images_stay_dropped(self, tmp_path):
        store = fresh(tmp_path)
        fill(store, ["a", "b"])
        store.drop(["a", "never there"])
        assert FeatureStore(store.folder).keys == store.keys == ("b",)


class TestCrashes:
    def test_a_shard_without_manifest_is_ignored_then_removed(self, tmp_path, monkeypatch):
        fill(fresh(tmp_path), ["a"])
        kill_before_manifest(monkeypatch, fresh(tmp_path), ["b"])
        store = fresh(tmp_path)
        orphan = store.folder / "vectors-000001.npy"
        assert orphan.exists()
        assert store.keys == ("a",)
        with store.writing():
            assert not orphan.exists()
        newer = fill(store, ["b"], seed=5)
        assert np.array_equal(FeatureStore(store.folder).read(["b"]).cls[0], newer["b"][0])

    def test_half_written_files_are_removed_and_strangers_are_not(self, tmp_path):
        store = fresh(tmp_path)
        part, stranger = store.folder / ".vectors-000000.npy.x.part", store.folder / "notes.txt"
        part.write_text("half")
        stranger.write_text("mine")
        fill(store, ["a"])
        assert not part.exists()
        assert stranger.exists()

    @pytest.mark.parametrize("harm", ["truncate", "remove"])
    def test_a_damaged_shard_counts_as_missing(self, tmp_path, harm, caplog):
        store = fresh(tmp_path)
        fill(store, ["a"])
        fill(store, ["b"])
        path = store.folder / "vectors-000000.npy"
        path.unlink() if harm == "remove" else path.write_bytes(path.read_bytes()[:-4])
        reopened = FeatureStore(store.folder)
        assert reopened.keys == ("b",)
        assert reopened.missing({"a": "d-a", "b": "d-b"}) == ("a",)
        assert "damaged or gone" in caplog.text

    def test_a_second_writer_is_refused(self, tmp_path):
        store = fresh(tmp_path)
        with (
            store.writing(),
            pytest.raises(RunFolderError, match="Another process"),
            FeatureStore(store.folder).writing(),
        ):
            pass

    def test_a_writer_sees_what_another_wrote_since_it_was_opened(self, tmp_path):
        first, second = fresh(tmp_path), fresh(tmp_path)
        fill(first, ["a"])
        fill(second, ["b"])
        assert FeatureStore(first.folder).keys == ("a", "b")


class TestSpecs:
    @pytest.mark.parametrize(
        "change",
        [
            {"backbone_digest": "abd"},
            {"bands": ("green", "red", "blue")},
            {"size": 32},
            {"fit": "squash"},
            {"layers": (1,)},
            {"norm": False},
        ],
    )
    def test_every_field_leads_to_another_folder(self, tmp_path, change):
        other = replace(SPEC, **change)
        assert store_name(other) != store_name(SPEC)
        fill(fresh(tmp_path), ["a"])
        assert fresh(tmp_path, other).keys == ()

    def test_the_spec_survives_the_disk(self, tmp_path):
        spec = replace(SPEC, layers=(2, 5))
        assert FeatureStore(fresh(tmp_path, spec).folder).spec == spec

    def test_a_store_moved_to_anothers_name_is_refused(self, tmp_path):
        other = replace(SPEC, size=32)
        fresh(tmp_path).folder.rename(tmp_path / store_name(other))
        with pytest.raises(DataError, match="asked for were"):
            fresh(tmp_path, other)


class TestAppend:
    def test_wrong_shapes_are_refused(self, tmp_path):
        cls, mean, _ = rows(0, 2)
        with pytest.raises(ShapeError, match="this store takes"):
            fresh(tmp_path).append({"a": "d"}, cls, mean)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_numbers_that_are_not_finite_are_refused_with_the_key(self, tmp_path, value):
        cls, mean, _ = rows(0, 2)
        cls[1, 2] = value
        store = fresh(tmp_path)
        with pytest.raises(DataError, match="cls of 'b'"):
            store.append({"a": "d", "b": "d"}, cls, mean)
        assert store.keys == ()

    def test_patches_beyond_float16_are_refused(self, tmp_path):
        cls, mean, tokens = rows(0, 1)
        with pytest.raises(DataError, match="patches of 'a'"):
            fresh(tmp_path).append({"a": "d"}, cls, mean, tokens * 1e6)
