from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dino_adapters.contracts import RGB, DataError, ShapeError
from dino_adapters.data.resize import to_square
from dino_adapters.data.units import to_model
from dino_adapters.features import embed, extract
from dino_adapters.runtime.console import Notices


def run(backbone, source, folder, **options: Any):
    return embed(backbone, source, folder, quiet=True, batch_size=4, **options)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(extract, "SHARD_ROWS", 8)


class TestNumbers:
    @pytest.mark.parametrize("fit", ["crop", "squash"])
    def test_vectors_are_those_of_one_image_alone(self, backbone, source, tmp_path, fit):
        store = run(backbone, source, tmp_path, fit=fit, patches=True)
        assert store.keys == source.keys
        assert store.spec.fit == fit
        stored = store.read(source.keys, patches=True)
        assert stored.patches is not None
        for row, key in enumerate(source.keys):
            image = to_square(to_model(source.read(key), backbone.info), 16, fit)
            alone = backbone(image[None])
            np.testing.assert_allclose(stored.cls[row], alone.cls[0], rtol=1e-6)
            np.testing.assert_allclose(stored.mean[row], alone.patches[0].mean(0), rtol=1e-5)
            np.testing.assert_allclose(stored.patches[row], alone.patches[0], rtol=1e-3, atol=1e-3)

    def test_the_number_of_threads_changes_nothing(self, make_backbone, source, tmp_path):
        source.images["grey.png"] = np.full((1, 30, 30), 7, np.uint8)
        source.broken = {"im03.png", "im11.png"}
        results = []
        for workers in (1, 4):
            notices = Notices()
            folder = tmp_path / str(workers)
            store = run(make_backbone(), source, folder, workers=workers, notices=notices)
            results.append((store.read(store.keys), notices.summary()))
        (first, said), (second, said_too) = results
        assert first.keys == second.keys
        assert np.array_equal(first.cls, second.cls)
        assert np.array_equal(first.mean, second.mean)
        assert said == said_too
        assert len(said) == 2

    def test_a_larger_size_gives_another_store_and_grid(self, backbone, source, tmp_path):
        small, large = (run(backbone, source, tmp_path, size=size) for size in (16, 24))
        assert (small.grid, large.grid) == ((2, 2), (3, 3))
        assert small.folder != large.folder

    def test_size_defaults_to_the_networks(self, backbone, source, tmp_path):
        assert run(backbone, source, tmp_path).spec.size == 16

    @pytest.mark.parametrize(("size", "nearest"), [(20, 24), (19, 16), (3, 8), (0, 8)])
    def test_a_size_between_patches_is_refused(self, backbone, source, tmp_path, size, nearest):
        if size == 20:
            nearest = 16  # halfway: the smaller one
        with pytest.raises(ShapeError, match=rf"size is {size}.*nearest is {nearest}\."):
            run(backbone, source, tmp_path, size=size)
        assert backbone.images_seen == 0


class TestComputingOnce:
    def test_a_second_call_computes_nothing(self, backbone, source, tmp_path):
        first = run(backbone, source, tmp_path)
        seen, reads = backbone.images_seen, source.reads
        assert seen == len(source)
        second = run(backbone, source, tmp_path)
        assert backbone.images_seen == seen
        assert source.reads == reads + 1  # the one that tells how the source is read
        assert np.array_equal(first.read(source.keys).cls, second.read(source.keys).cls)

    def test_a_subset_then_the_rest(self, backbone, source, tmp_path):
        run(backbone, source, tmp_path, keys=source.keys[:5])
        assert backbone.images_seen == 5
        run(backbone, source, tmp_path)
        assert backbone.images_seen == len(source)

    def test_only_a_changed_file_is_computed_again(self, backbone, source, tmp_path):
        before = run(backbone, source, tmp_path).read(source.keys)
        seen = backbone.images_seen
        source.images["im05.png"] = 255 - source.images["im05.png"]
        after = run(backbone, source, tmp_path).read(source.keys)
        assert backbone.images_seen == seen + 1
        changed = (before.cls != after.cls).any(axis=1)
        assert [key for key, c in zip(source.keys, changed, strict=True) if c] == ["im05.png"]

    def test_other_weights_go_to_another_store(self, make_backbone, source, tmp_path):
        first = run(make_backbone(), source, tmp_path)
        other = make_backbone("weights-2")
        second = run(other, source, tmp_path)
        assert other.images_seen == len(source)
        assert first.folder != second.folder

    def test_another_value_range_is_computed_again(
        self, make_backbone, make_source, source, tmp_path
    ):
        before = run(make_backbone(), source, tmp_path).read(source.keys)
        dark = make_source(source.images, tuple(replace(band, high=510.0) for band in RGB))
        backbone = make_backbone()
        after = run(backbone, dark, tmp_path).read(source.keys)
        assert backbone.images_seen == len(source)
        assert not np.isclose(before.cls, after.cls).any()

    def test_patches_are_computed_when_first_asked_for(self, backbone, source, tmp_path):
        run(backbone, source, tmp_path)
        for _ in range(2):
            run(backbone, source, tmp_path, patches=True)
            assert backbone.images_seen == 2 * len(source)
        run(backbone, source, tmp_path)
        assert backbone.images_seen == 2 * len(source)


@pytest.mark.usefixtures("small_shards")
class TestInterruptions:
    def test_an_interrupted_run_continues(self, make_backbone, source, tmp_path):
        backbone = make_backbone()
        backbone.stop_after = 12
        with pytest.raises(KeyboardInterrupt):
            run(backbone, source, tmp_path)
        backbone.stop_after = None
        continued = run(backbone, source, tmp_path)
        assert backbone.images_seen == len(source)
        whole = run(make_backbone(), source, tmp_path / "whole")
        for a, b in (
            (continued.read(source.keys).cls, whole.read(source.keys).cls),
            (continued.read(source.keys).mean, whole.read(source.keys).mean),
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)

    def test_a_run_killed_before_the_manifest_loses_that_shard_only(
        self, backbone, source, tmp_path, monkeypatch
    ):
        class Killed(BaseException):
            pass

        saves = []
        save = extract.FeatureStore._save

        def die_at_second(store):
            saves.append(1)
            if len(saves) >= 2:
                raise Killed
            save(store)

        with monkeypatch.context() as patch:
            patch.setattr(extract.FeatureStore, "_save", die_at_second)
            with pytest.raises(Killed):
                run(backbone, source, tmp_path)
        seen = backbone.images_seen
        store = run(backbone, source, tmp_path)
        assert backbone.images_seen == seen + len(source) - 8
        assert store.keys == source.keys
        named = {file.name for file in store.folder.glob("vectors-*.npy")}
        assert named == {f"vectors-{i:06d}.npy" for i in range(len(named))}
        assert torch.isfinite(torch.from_numpy(store.read(source.keys).cls)).all()


class TestUnreadable:
    def test_they_are_skipped_counted_and_named(self, backbone, source, tmp_path):
        source.broken = {"im02.png", "im20.png"}
        notices = Notices()
        store = run(backbone, source, tmp_path, notices=notices)
        assert set(source.keys) - set(store.keys) == source.broken
        assert notices.summary() == ("Unreadable files skipped (2×): im02.png, im20.png",)

    def test_too_many_stop_the_run_and_keep_what_was_computed(self, backbone, source, tmp_path):
        source.broken = {"im09.png", "im12.png", "im20.png"}
        with pytest.raises(DataError, match=r"3 files cannot be read, and at most 2"):
            run(backbone, source, tmp_path)
        seen = backbone.images_seen
        assert seen > 0
        run(backbone, source, tmp_path, max_unreadable=0.2)
        assert backbone.images_seen == len(source) - 3

    def test_a_file_that_became_unreadable_leaves_the_store(self, backbone, source, tmp_path):
        run(backbone, source, tmp_path)
        source.images["im04.png"] = source.images["im04.png"][:, :5]
        source.broken = {"im04.png"}
        assert "im04.png" not in run(backbone, source, tmp_path).keys

    def test_images_smaller_than_a_patch_are_skipped(self, backbone, source, tmp_path):
        source.images["im00.png"] = np.zeros((3, 40, 5), np.uint8)
        assert "im00.png" not in run(backbone, source, tmp_path).keys


class TestRefusals:
    def test_no_images(self, backbone, make_source, tmp_path):
        with pytest.raises(DataError, match="no images"):
            run(backbone, make_source({}), tmp_path)

    def test_unknown_keys(self, backbone, source, tmp_path):
        with pytest.raises(DataError, match=r"1 of 2 keys.*'nope'"):
            run(backbone, source, tmp_path, keys=["im00.png", "nope"])
