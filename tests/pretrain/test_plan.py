"""What a run would be: lines through trials, what comes on top, what is advised, a real trial."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import DataError, RecipeError, WeightsError
from dino_adapters.pretrain import estimate, memory
from dino_adapters.pretrain.estimate import (
    Cost,
    decoding_seconds,
    looking_seconds,
    memory_line,
    mixture_share,
    seconds_line,
    trial_recipe,
    trials,
)
from dino_adapters.pretrain.memory import available_bytes, held_bytes, peak_bytes
from dino_adapters.pretrain.phase_plan import gigabytes, local_share
from dino_adapters.pretrain.plan import make_plan
from dino_adapters.pretrain.trial import Measured, NoRoomError, Trial, measure, tried
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices

SEEN = Measured(
    batch=8,
    micro=8,
    peak_bytes=10**9,
    step_seconds=0.1,
    device="cpu",
    available_bytes=10**10,
    precision="fp32",
    network="net",
    backbone_parameters=1000,
    head_parameters=500,
    trained_parameters=1500,
    weight_bytes=6000,
    gradient_bytes=6000,
    moment_bytes=12000,
    average_bytes=6000,
    teacher_bytes=0,
    with_ibot=True,
    patch_size=8,
    image_bytes=10_000,
    decode_seconds=0.01,
    look_seconds=0.001,
    look_sizes=(24, 48),
    warnings=(),
)


BYTES, SECONDS = Cost(10**9, 10**6, 10**5), Cost(0.1, 0.0, 0.02, 0.03)


def world(memory=BYTES, seconds=SECONDS, **facts):
    """Trials in a world where the lines are exact."""
    asked = []

    def take(trial: Trial) -> Measured:
        told = PretrainRecipe.model_validate(trial.recipe)
        batch = told.optim.batch_size
        micro = min(told.parallel.micro_batch or batch, batch)
        asked.append((batch, micro))
        peak = memory.of(batch, micro)
        if peak > facts.get("limit", math.inf):
            raise NoRoomError
        found = replace(SEEN, batch=batch, micro=micro, peak_bytes=round(peak))
        own = {key: value for key, value in facts.items() if key != "limit"}
        return replace(found, step_seconds=seconds.of(batch, micro), **own)

    return take, asked


def seen(cost, seconds, batch, micro):
    return replace(
        SEEN,
        batch=batch,
        micro=micro,
        peak_bytes=round(cost.of(batch, micro)),
        step_seconds=seconds.of(batch, micro),
    )


SLOPES = st.tuples(*[st.integers(1, 10**9)] * 3)
SHARES = st.tuples(*[st.floats(1e-3, 10.0)] * 3)


@given(SLOPES, SHARES, st.integers(2, 64), st.integers(2, 8))
@settings(deadline=None)
def test_lines_are_found_again(costs, seconds, low, times):
    cost, took = Cost(*map(float, costs)), Cost(seconds[0], 0.0, seconds[1], seconds[2])
    pair = [seen(cost, took, low, low), seen(cost, took, times * low, times * low)]
    parts = seen(cost, took, 5 * low, low)
    for batch, micro in ((100, 10), (64, 64), (7, 3)):
        found = memory_line(pair, parts).of(batch, micro)
        assert found == pytest.approx(cost.of(batch, micro), rel=1e-6, abs=100)
        found = seconds_line(pair, parts).of(batch, micro)
        assert found == pytest.approx(took.of(batch, micro), rel=1e-6)
    whole = 3 * low
    assert memory_line(pair, None).of(whole, whole) == pytest.approx(cost.of(whole, whole), abs=100)
    assert seconds_line(pair, None).of(whole, whole) == pytest.approx(took.of(whole, whole))


def test_the_line_goes_through_the_larger_trial():
    low, high = replace(SEEN, peak_bytes=500), replace(SEEN, batch=32, micro=32, peak_bytes=400)
    assert memory_line([low, high], None).of(32, 32) == 400
    quick = replace(high, step_seconds=0.05)  # faster with more images: noise
    line = seconds_line([replace(SEEN, step_seconds=0.1), quick], None)
    assert line.of(32, 32) == pytest.approx(0.05)
    assert line.of(64, 64) == pytest.approx(0.1)


def test_parts_never_save_time():
    pair = [replace(SEEN, step_seconds=0.8), replace(SEEN, batch=16, micro=16, step_seconds=1.6)]
    parts = replace(SEEN, batch=32, step_seconds=2.0)
    assert seconds_line(pair, parts).of(32, 8) == pytest.approx(3.2)


@pytest.mark.parametrize(
    ("micro", "facts", "expected"),
    [
        (32, {}, [8, 32]),
        (8, {}, [2, 8]),
        (2, {}, [2, 4]),
        (1, {}, [2, 4]),
        (512, {"step_seconds": 1.0}, [8, 32]),  # 4 s of patience
        (512, {"step_seconds": 1.0, "device": "cuda:0"}, [8, 64]),  # 9 GB of room
        (512, {"step_seconds": 9.0}, [8, 16]),
        (512, {"available_bytes": 10**8}, [8, 16]),
    ],
)
def test_trials_stay_small(micro, facts, expected):
    asked = []

    def take(batch, micro):
        asked.append(batch)
        return replace(SEEN, batch=batch, micro=micro, **facts)

    trials(take, micro)
    assert asked == expected


def test_a_trial_without_room_is_made_smaller():
    asked = []

    def take(batch, micro):
        asked.append(batch)
        if batch > 16:
            raise NoRoomError
        return replace(SEEN, batch=batch, micro=micro)

    low, high = trials(take, 64)
    assert (asked, low.batch, high.batch) == ([8, 64, 16], 8, 16)


def test_a_plan_in_an_exact_world(tiny):
    take, asked = world()
    plan = make_plan(tiny(optim={"batch_size": 64}, steps=100), trial=take)
    (phase,) = plan.phases
    assert asked == [(8, 8), (64, 64)]
    assert (phase.images, phase.batch, phase.micro, phase.passes) == (10, 64, 64, 640.0)
    assert phase.peak_bytes == 10**9 + 64 * 1_100_000 + 10 * 10_000
    assert phase.step_s == pytest.approx(0.1 + 64 * 0.02 + 0.03)
    assert phase.fits
    assert plan.fits
    # The line without a third trial: all that grows is one slope.
    assert phase.largest_batch == (9 * 10**9 - 10**9 - 100_000) // 1_100_000
    assert plan.total_s == phase.total_s > 100 * phase.step_s
    assert any("images a step fit without micro-batches" in line for line in plan.lines())


def test_micro_batches_are_tried_where_they_are_asked_for(tiny):
    take, asked = world()
    told = tiny(optim={"batch_size": 256}, parallel={"micro_batch": 32})
    (phase,) = make_plan(told, trial=take).phases
    assert asked[:2] == [(8, 8), (32, 32)]
    assert asked[2][0] > asked[2][1] == 8
    assert phase.peak_bytes == 10**9 + 32 * 10**6 + 256 * 10**5 + 100_000
    assert phase.step_s == pytest.approx(0.1 + 256 * 0.02 + 8 * 0.03)


def test_what_does_not_fit_is_told_what_would(tiny):
    take, _ = world(available_bytes=2 * 10**9)
    told = tiny(optim={"batch_size": 1024}, crops={"local_count": 6})
    plan = make_plan(told, trial=take)
    (phase,) = plan.phases
    room = int(0.9 * 2 * 10**9)
    assert not plan.fits
    # 1e9 + 1e6 m + 1e5 * 1024 + 1e5 of decoded images <= room
    assert phase.largest_micro == (room - 10**9 - 102_400_000 - 100_000) // 10**6
    assert "parallel.micro_batch=512 fits, with a peak of 1.61 GB" in phase.advice
    assert "crops.local_count=2" in " ".join(phase.advice)
    assert "optim.batch_size=512 fits" in " ".join(phase.advice)
    halved = tiny(optim={"batch_size": 1024}, parallel={"micro_batch": 512})
    assert make_plan(halved, trial=take).fits
    (peak,) = [row[1] for row in plan.table().rows if row[0] == "peak memory"]
    assert "too much" in peak


def test_a_gpu_is_told_of_bf16(tiny):
    take, _ = world(available_bytes=2 * 10**9, device="cuda:0")
    (phase,) = make_plan(tiny(optim={"batch_size": 1024}), trial=take).phases
    assert any("precision=bf16" in sentence for sentence in phase.advice)


def test_a_gram_term_over_the_batch_is_not_divided(tiny):
    take, asked = world(available_bytes=2 * 10**9)
    told = tiny(optim={"batch_size": 1024}, gram={"level": "batch"})
    (phase,) = make_plan(told, trial=take).phases
    assert len(asked) == 2
    assert not any("micro_batch" in sentence for sentence in phase.advice)


def test_no_room_at_all_is_refused(tiny):
    take, _ = world(limit=10**9)
    with pytest.raises(RecipeError, match="Not even four images at a time fit"):
        make_plan(tiny(), trial=take)


def test_auto_is_settled_and_said(tiny):
    take, _ = world()
    told = tiny(optim={"batch_size": "auto"}, steps="auto", objective={"prototypes": "auto"})
    plan = make_plan(told, trial=take)
    assert (plan.recipe.optim.batch_size, plan.recipe.objective.prototypes) == (8, 64)
    assert plan.recipe.steps == 300
    assert plan.lines()[0].startswith("optim.batch_size is 8: ")
    told = plan.as_json()
    assert [r["key"] for r in told["reasons"]] == [
        "optim.batch_size",
        "objective.prototypes",
        "steps",
    ]
    assert told["phases"][0]["steps"] == 300


def test_the_table_has_a_column_for_each_phase(tiny, monkeypatch):
    take, _ = world()
    made = []
    monkeypatch.setattr("dino_adapters.pretrain.plan.export_networks", made.append)
    told = tiny(phases=[{"name": "one"}, {"name": "two", "steps": 12}, {"name": "three"}])
    starts = []

    def noted(trial):
        starts.append((trial.start, list(trial.earlier)))
        return take(trial)

    table = make_plan(told, trial=noted).table()
    assert table.header == ("", "one", "two", "three")
    assert all(len(row) == 4 for row in table.rows)
    rows = {row[0]: row[1:] for row in table.rows}
    assert [cell.split()[0] for cell in rows["steps"]] == ["6", "12", "6"]
    assert starts[::2] == [("fresh", []), ("teacher", ["one"]), ("teacher", ["one", "two"])]
    assert [list(trial.earlier) for trial in made] == [[], ["one"]]


def test_a_trial_has_steps_as_costly_as_any(tiny):
    told = tiny(
        schedule={"freeze_backbone": 0.2, "backbone_ramp": 0.1, "local_ramp": 0.5},
        gram={"copy_at": 4, "ramp": 0.5, "refresh_every": 2, "first_refresh": 5},
        objective={"koleo_group": 4, "koleo_neighbours": 2},
        optim={"batch_size": 8},
        checkpoint={"snapshots": 3},
    )
    small = trial_recipe(told, 40, 2, 2)
    assert (small.schedule.freeze_backbone, small.schedule.local_ramp) == (0.0, 0.0)
    assert small.gram is not None
    assert (small.gram.copy_at, small.gram.ramp, small.gram.refresh_every) == (None, 0.0, None)
    assert (small.objective.koleo_group, small.objective.koleo_neighbours) == (None, 1)
    assert trial_recipe(told, 40, 8, 4).objective.koleo_group == 4
    assert (small.optim.batch_size, small.data.image_size) == (2, 40)
    assert small.parallel.micro_batch is None
    assert trial_recipe(told, 40, 8, 4).parallel.micro_batch == 4
    assert small.monitor.every == 0
    assert (small.crops, small.model) == (told.crops, told.model)


def mixed(tiny):
    return tiny(
        crops={
            "mixture": [
                {"global_size": 24, "local_size": 16, "probability": 3.0},
                {"global_size": 48, "local_size": 24, "gram_size": 64, "probability": 1.0},
            ]
        },
        gram={},
    )


def test_a_trial_of_a_mixture_has_the_largest_sizes(tiny):
    small = trial_recipe(mixed(tiny), 60, 4, 4)
    assert not small.crops.mixture
    assert small.gram is not None
    sizes = (small.crops.global_size, small.crops.local_size, small.gram.size)
    assert sizes == (48, 24, 64)


def test_a_mixture_is_as_much_work_as_its_mean(tiny):
    # 2 global crops: teacher 1, student 3; 2 local crops: 3; Gram teacher: 1, at 24 px by itself.
    low = 2 * 24**2 * 4 + 2 * 16**2 * 3 + 2 * 24**2
    high = 2 * 48**2 * 4 + 2 * 24**2 * 3 + 2 * 64**2
    assert mixture_share(mixed(tiny)) == pytest.approx((0.75 * low + 0.25 * high) / high)
    assert mixture_share(tiny()) == 1.0


def test_decoding_takes_what_is_left_of_the_cores(tiny, monkeypatch):
    told = tiny(optim={"batch_size": 4}, steps=100)
    once = 10 * 0.01  # ten images, all kept
    assert decoding_seconds(told, 10, 100_000, 0.1, SEEN) == pytest.approx(once)
    # Nothing is kept: every image is decoded each time.
    assert decoding_seconds(told, 10, 0, 0.1, SEEN) == pytest.approx(400 * 0.01)
    assert decoding_seconds(told, 10, 50_000, 0.1, SEEN) == pytest.approx(once + 390 * 0.5 * 0.01)
    busy = tiny(optim={"batch_size": 4}, steps=100, data={"workers": 2})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(estimate, "cores", lambda: 4)
    assert decoding_seconds(busy, 10, 0, 0.1, SEEN) == pytest.approx(400 * 0.01 / 4)
    gpu = replace(SEEN, device="cuda:0", decode_seconds=1.0)
    assert decoding_seconds(busy, 10, 0, 0.1, gpu) == pytest.approx(400 / 2 - 100 * 0.1)
    assert decoding_seconds(busy, 10, 0, 9.9, gpu) == 0.0


def test_looks_count_the_one_before_the_first_step(tiny):
    told = tiny(monitor={"every": 0.25, "images": 4})
    assert looking_seconds(told, 10, 0, SEEN) == pytest.approx(5 * 4 * 0.001)
    assert looking_seconds(tiny(monitor={"every": 0.0}), 10, 8, SEEN) == 0.0
    passes = 4 + 8 * (24**2 + 48**2) / 24**2
    each = passes * 0.001 + 8 * 0.01
    assert looking_seconds(told, 10, 8, SEEN) == pytest.approx(5 * each)
    gated = tiny(monitor={"every": 0.25, "images": 4}, gate={})
    # The verdict reads the labelled images once more.
    assert looking_seconds(gated, 10, 8, SEEN) == pytest.approx(6 * each - 4 * 0.001)


def test_labels_that_do_not_fit_cost_no_trial(tiny, tmp_path):
    def take(trial):
        pytest.fail("a trial was made")

    told = tiny(monitor={"every": 0.5, "labels": str(tmp_path / "none.csv")})
    with pytest.raises(DataError, match=r"none\.csv. Give a CSV file with the columns path and"):
        make_plan(told, trial=take)


def test_a_plan_tells_what_its_trial_warned_of(tiny, photographs):
    (photographs / "notes.txt").write_text("no image")
    notices = Notices()
    known = "files ignored because they are no images by their suffix (first: notes.txt)"
    take, _ = world(warnings=(known, "Four bands, and none of them red."))
    (phase,) = make_plan(tiny(), notices=notices, trial=take).phases
    assert phase.warnings == ("Four bands, and none of them red.",)
    assert "Four bands, and none of them red." in phase.lines()


def test_a_trial_hears_warnings_and_not_what_is_said_of_settings(tiny):
    bands = {"bands": ["a", "b", "c"]}
    found = tried(Trial(tiny(data=bands, optim={"batch_size": 4}).model_dump(mode="json")))
    assert any("not red, green, blue" in line for line in found["warnings"])
    assert not any("Sinkhorn" in line for line in found["warnings"])  # a word on the batch


def test_bytes_in_words():
    assert [gigabytes(n) for n in (2_000, 3_400_000, 1_234_567_890)] == ["2 kB", "3 MB", "1.23 GB"]


def test_share_of_local_crops(tiny):
    assert local_share(tiny()) == pytest.approx(2 * 16**2 / (2 * 24**2 + 2 * 16**2))


def test_prototype_scores(tiny):
    take, _ = world()
    (phase,) = make_plan(tiny(), trial=take).phases
    # Batches of 4 with 2 + 2 crops, K = 16; 24 px are 9 patches, half of the crops masked by 0.3.
    masked = 4 * 2 * 9 * 0.5 * 0.3
    teacher, student = 2 * 4 * (4 * 2 * 16 + masked * 16), 4 * (4 * 4 * 16 + masked * 16)
    assert phase.logit_bytes == (round(teacher), round(student))


def test_a_peak_outlasts_what_made_it():
    before, size = held_bytes(), 150_000_000
    held = bytearray(size)
    held[::4096] = b"x" * len(held[::4096])
    del held
    assert peak_bytes(torch.device("cpu")) >= before + 0.95 * size
    assert held_bytes() < before + 0.5 * size


def test_a_container_has_its_own_limit(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    limit, use = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "GROUP_LIMIT", limit)
    monkeypatch.setattr(memory, "GROUP_USE", use)
    whole = available_bytes(cpu)
    assert whole > 10**8
    limit.write_text("max\n")
    assert available_bytes(cpu) == pytest.approx(whole, rel=0.2)
    limit.write_text("60000000\n")
    use.write_text("20000000\n")
    assert available_bytes(cpu) == pytest.approx(40_000_000 + held_bytes(), rel=0.01)


def test_a_trial_counts_every_network_once(tiny):
    told = tiny(gram={}, optim={"batch_size": 2}, steps=8)
    found = tried(Trial(told.model_dump(mode="json")))
    assert found["trained_parameters"] == found["backbone_parameters"] + found["head_parameters"]
    whole = found["trained_parameters"]
    assert found["gradient_bytes"] == 4 * whole
    # Two moments and AdamW's count of steps for each tensor.
    assert 8 * whole <= found["moment_bytes"] < 8 * whole + 4 * whole
    assert found["weight_bytes"] >= 4 * whole
    assert found["average_bytes"] == found["weight_bytes"]
    assert 0 < found["teacher_bytes"] < found["weight_bytes"]  # the backbone alone
    assert found["image_bytes"] == 3 * 40 * 50
    assert found["batch"] == found["micro"] == 2
    assert found["step_seconds"] > 0


@pytest.mark.slow
def test_a_trial_in_its_own_process(tiny):
    told = tiny(optim={"batch_size": 4}).model_dump(mode="json")
    found = measure(Trial(told))
    assert 10**8 < found.peak_bytes < found.available_bytes
    assert found.look_sizes
    told["model"]["source"] = "no/such/weights"
    with pytest.raises((WeightsError, LookupError, RecipeError), match="no/such/weights"):
        measure(Trial(told))


REAL = """
import sys
from pathlib import Path
import torch
from dino_adapters.pretrain.loop import train
from dino_adapters.pretrain.memory import peak_bytes
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.runfolder import RunFolder
recipe = PretrainRecipe.model_validate_json(sys.argv[1])
train(recipe, RunFolder(Path(sys.argv[2])), quiet=True)
print(peak_bytes(torch.device("cpu")))
"""


@pytest.mark.slow
def test_a_run_needs_what_was_planned(photographs, tmp_path):
    recipe = PretrainRecipe.model_validate(
        {
            "data": {"source": str(photographs), "workers": 0},
            "model": {"source": "vitmicro8"},
            "crops": {"global_size": 48, "local_size": 24},
            "optim": {"batch_size": 48},
            "monitor": {"every": 0.0},
            "steps": 15,
            "device": "cpu",
        }
    )
    (phase,) = make_plan(recipe).phases
    words = [sys.executable, "-c", REAL, recipe.model_dump_json(), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert phase.peak_bytes == pytest.approx(int(done.stdout.split()[-1]), rel=0.1)


@pytest.mark.slow
def test_phases_are_tried_from_the_networks_before_them(tiny):
    told = tiny(
        phases=[
            {"name": "first", "checkpoint": {"snapshots": 1}},
            {"name": "anchored", "gram": {"teacher": "first@3"}},
            {
                "name": "small",
                "gram": None,
                "distill": {
                    "students": {"s": {"source": "vitmicro8", "architecture": {"depth": 1}}}
                },
            },
        ]
    )
    plan = make_plan(told)
    assert [phase.measured.teacher_bytes > 0 for phase in plan.phases] == [False, True, True]
    first, _, last = (phase.measured.backbone_parameters for phase in plan.phases)
    assert last > 0
    assert first > 0
