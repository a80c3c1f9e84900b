"""Checkpoints: whole or not at all, equal to the bit, damaged ones found, nothing executed."""

import errno
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as torch_load

from dino_adapters.contracts import CheckpointError, DiskFullError
from dino_adapters.pretrain import checkpoint, together
from dino_adapters.pretrain.checkpoint import Meta, Progress
from dino_adapters.pretrain.checkpoint_files import TensorPlanner
from dino_adapters.runtime.files import file_digest, json_digest
from dino_adapters.runtime.world import ALONE

RANKS = Path(__file__).with_name("checkpoint_ranks.py")


def some_tensors(seed=0):
    draws = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 8, generator=draws)
    return {
        "student/backbone.weight": nn.Parameter(base.clone()),
        "student/mask": torch.tensor([True, False]),
        "half": torch.randn(5, generator=draws).bfloat16(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "turned": base.T,
        "view": base[1:3],
        "last": torch.randn(1, 3, 4, 4, generator=draws).to(memory_format=torch.channels_last),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def zeros_like(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[k].dtype == expected[k].dtype and bits(found[k]) == bits(expected[k]) for k in found
    )


def save(folder, tensors, step, *, keep=10, **told):
    return checkpoint.save(
        folder, tensors, Meta(Progress(step, 1.5), **told), keep=keep, world=ALONE
    )


def load(path, tensors, **told):
    checkpoint.load(path, tensors, ALONE, **told)


def trusted(path):
    """The index as torch reads it."""
    return cast(Any, pickle.loads((path / ".metadata").read_bytes()))


def mend(path):
    """Makes digests fit what lies there, as someone who means harm would."""
    content = json.loads((path / "meta.json").read_text())
    for name in content["files"]:
        file = path / name
        content["files"][name] = [file.stat().st_size, file_digest(file)]
    del content["digest"]
    (path / "meta.json").write_text(json.dumps(content | {"digest": json_digest(content)}))


@pytest.fixture
def three(tmp_path):
    """Three checkpoints with their tensors."""
    folder = tmp_path / "checkpoints"
    return folder, {step: (save(folder, t := some_tensors(step), step), t) for step in (1, 2, 3)}


# What is written comes back.


def test_round_trip_to_the_bit(tmp_path):
    tensors = some_tensors()
    meta = Meta(
        Progress(12, 3.25, skipped=1, rollbacks=2),
        inputs={"images": 3, "digest": "ab", "nested": [1, {"x": None}]},
        numbers={"updates": 4, "best": 0.1 + 0.2, "name": "é", "none": None, "gone": {}},
    )
    path = checkpoint.save(tmp_path, tensors, meta, keep=1, world=ALONE)
    assert path == tmp_path / "step_00000012"
    found = zeros_like(tensors)
    load(path, found)
    assert same(found, tensors)
    assert checkpoint.meta_of(path) == meta
    assert checkpoint.names(path) == set(tensors)
    assert meta.progress.pace == 0.25


def test_loads_in_place_and_keeps_the_layout(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, tensors, 1)
    module = nn.Linear(8, 6, bias=False)
    weight, turned = module.weight, torch.zeros(6, 8).T
    before = weight.data_ptr()
    load(path, zeros_like(tensors) | {"student/backbone.weight": weight, "turned": turned})
    assert module.weight is weight
    assert weight.data_ptr() == before
    assert weight.requires_grad
    assert torch.equal(weight, tensors["student/backbone.weight"])
    assert torch.equal(turned, tensors["turned"])
    assert turned.stride() == (1, 8)


def test_torch_reads_it_too(tmp_path):
    tensors = {"a": torch.randn(3)}
    path = save(tmp_path, tensors, 1)
    found = {"a": torch.zeros(3)}
    with pytest.warns(UserWarning, match="single process"):
        torch_load(found, checkpoint_id=path, no_dist=True)
    assert torch.equal(found["a"], tensors["a"])


def test_no_path_of_the_machine_is_written(tmp_path):
    path = save(tmp_path, some_tensors(), 1)
    for file in path.iterdir():
        assert os.fsencode(tmp_path) not in file.read_bytes()


def test_blank_has_shape_and_dtype(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, tensors, 1)
    found = checkpoint.blank(path, "student/", torch.device("cpu"))
    assert same(found, zeros_like({k: tensors[k] for k in found}))
    assert set(found) == {"student/backbone.weight", "student/mask"}


def test_numbers_that_json_does_not_know_are_refused_before_writing(tmp_path):
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            save(tmp_path / "runs", {"a": torch.zeros(1)}, 1, numbers={"x": bad})
    assert not (tmp_path / "runs").exists()


def test_no_tensors_at_all(tmp_path):
    path = save(tmp_path, {}, 1)
    load(path, {})
    assert checkpoint.names(path) == set()


# Which ones stay.


def test_the_last_few_stay(tmp_path):
    for step in (1, 2, 9, 100, 123456789):
        save(tmp_path, {"a": torch.zeros(1)}, step, keep=3)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [
        "step_00000009",
        "step_00000100",
        "step_123456789",
    ]


def test_damaged_ones_do_not_count_among_those_kept(three):
    folder, made = three
    (made[2][0] / "__0_0.distcp").write_bytes(b"")
    save(folder, some_tensors(), 4, keep=3)
    assert [p.name[-1] for p in checkpoint.checkpoints(folder)] == ["1", "3", "4"]


def test_a_run_that_went_back_leaves_what_came_later(three):
    folder, _ = three
    path = save(folder, some_tensors(5), 2, keep=2)
    assert [p.name[-1] for p in checkpoint.checkpoints(folder)] == ["1", "2"]
    found = zeros_like(some_tensors())
    load(path, found)
    assert same(found, some_tensors(5))


def test_leftovers_of_a_killed_process_are_no_checkpoints_and_go(three):
    folder, made = three
    for left in (".step_00000004.part", ".step_00000003.old.x1"):
        shutil.copytree(made[3][0], folder / left)
    (folder / ".step_00000004.part" / "meta.json").unlink()
    assert checkpoint.newest_good(folder, ALONE) == (made[3][0], [])
    save(folder, some_tensors(), 4)
    assert sorted(os.listdir(folder)) == [f"step_0000000{step}" for step in (1, 2, 3, 4)]


def test_killed_between_any_two_files(three):
    """A target that was copied in part, as by a tool that moved the run."""
    folder, made = three
    names = sorted(os.listdir(made[3][0]))
    for count in range(len(names)):
        for kept in itertools.combinations(names, count):
            half = folder / "step_00000004"
            half.mkdir()
            for name in kept:
                shutil.copy(made[3][0] / name, half / name)
            found, passed = checkpoint.newest_good(folder, ALONE)
            assert found == made[3][0]
            assert len(passed) == 1
            assert f"{half} is damaged and was passed over: " in passed[0]
            shutil.rmtree(half)


# Damage.


def cut_inside(file):
    """As `cut`, of a file whose last characters are blank."""
    file.write_bytes(file.read_bytes()[:-3])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json"])
@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, longer])
def test_damage_is_found_before_anything_changes(three, name, harm):
    folder, made = three
    path, tensors = made[3]
    if (name, harm) == ("meta.json", cut):
        harm = cut_inside
    harm(path / name)
    found, passed = checkpoint.newest_good(folder, ALONE)
    assert found == made[2][0]
    assert len(passed) == 1
    assert name in passed[0]
    live = zeros_like(tensors)
    with pytest.raises(CheckpointError, match=r"Remove that folder to go on from the one before"):
        load(path, live)
    assert same(live, zeros_like(tensors))


def test_all_are_damaged(three):
    folder, made = three
    for path, _ in made.values():
        flip(path / "__0_0.distcp")
    found, passed = checkpoint.newest_good(folder, ALONE)
    assert found is None
    assert [sentence.split(" is ")[0] for sentence in passed] == [
        str(made[step][0]) for step in (3, 2, 1)
    ]


def test_nothing_there(tmp_path):
    assert checkpoint.newest_good(tmp_path / "none", ALONE) == (None, [])
    assert checkpoint.checkpoints(tmp_path / "none") == []
    for read in (checkpoint.meta_of, checkpoint.names):
        with pytest.raises(CheckpointError, match=r"meta\.json is missing"):
            read(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 9}', '{"step": 3, "inputs": {}}', "\xff"])
def test_other_formats_are_told(tmp_path, text):
    path = tmp_path / "step_00000001"
    path.mkdir()
    (path / "meta.json").write_text(text, encoding="latin-1")
    found, passed = checkpoint.newest_good(tmp_path, ALONE)
    assert found is None
    assert "meta.json" in passed[0]
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        checkpoint.meta_of(path)


# Names.


def test_names_shapes_and_dtypes_must_fit(three):
    _, made = three
    path, tensors = made[3]
    for change, words in (
        (lambda t: t.pop("half"), "it holds besides half"),
        (lambda t: t.update(new=torch.zeros(1)), "it lacks new"),
        (lambda t: t.update(half=torch.zeros(5)), r"half \(bfloat16 \(5,\) there, float32 \(5,\)"),
        (lambda t: t.update(odd=torch.zeros(4)), r"it differs in odd \(float32 \(3,\) there"),
        (lambda t: t.clear(), "it holds besides empty, half, last and 6 more"),
        (
            lambda t: t.update(odd=torch.zeros(3, device="meta")),
            r"odd \(float32 \(3,\) there, no memory here\)",
        ),
    ):
        live = zeros_like(tensors)
        change(live)
        before = {k: t.clone() for k, t in live.items() if not t.is_meta}
        with pytest.raises(CheckpointError, match=words):
            load(path, live)
        assert same({k: t for k, t in live.items() if not t.is_meta}, before)


def test_parts_may_be_left_unread(three):
    _, made = three
    path, tensors = made[3]
    live = {k: t for k, t in zeros_like(tensors).items() if not k.startswith(("student/", "o"))}
    load(path, live, without=("student/", "odd"))
    assert same(live, {k: tensors[k] for k in live})


# Nothing is executed.


class Evil:
    """Leaves a mark when it is read in torch's own way."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class Member:
    """How early releases of Python 3.11 wrote a member of an enumeration."""

    def __init__(self, kind, name):
        self.asked = kind, name

    def __reduce__(self):
        return getattr, self.asked


def harmful(mark, index):
    yield Evil(mark)
    index.planner_data = Evil(mark)
    yield index
    yield Member(torch.Size, "count")
    yield Metadata({"a": BytesStorageMetadata()})
    yield Metadata({"a": cast(Any, 3)})
    yield ["no metadata"]


@pytest.mark.parametrize("case", range(6))
def test_a_harmful_index_is_refused_without_running_it(tmp_path, case):
    tensors, mark = some_tensors(), tmp_path / "mark"
    path = save(tmp_path / "checkpoints", tensors, 1)
    thing = list(harmful(mark, trusted(path)))[case]
    (path / ".metadata").write_bytes(pickle.dumps(thing))
    mend(path)
    assert checkpoint.newest_good(path.parent, ALONE)[0] == path  # digests alone say nothing
    live = zeros_like(tensors)
    for read in (
        lambda: load(path, live),
        lambda: checkpoint.names(path),
        lambda: checkpoint.blank(path, "", torch.device("cpu")),
        lambda: checkpoint.blank_optimizer(path, []),
    ):
        with pytest.raises(CheckpointError, match=r"cannot be used: \.metadata"):
            read()
    assert not mark.exists()
    assert same(live, zeros_like(tensors))


def test_the_mark_would_be_left_otherwise(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_members_of_enumerations_are_read_either_way(tmp_path, monkeypatch):
    tensors = some_tensors()
    path = save(tmp_path, tensors, 1)
    entry = next(iter(trusted(path).state_dict_metadata.values()))
    formats = type(entry.properties.__getstate__()[3])
    monkeypatch.setattr(formats, "__reduce_ex__", lambda self, _: (getattr, (formats, self.name)))
    data = pickle.dumps(trusted(path))
    assert b"getattr" in data
    monkeypatch.undo()
    (path / ".metadata").write_bytes(data)
    mend(path)
    live = zeros_like(tensors)
    load(path, live)
    assert same(live, tensors)


def test_indices_of_older_versions_of_torch_are_read(tmp_path, monkeypatch):
    tensors = some_tensors()
    path = save(tmp_path, tensors, 1)
    index = trusted(path)
    real = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: real(self)[:5])
    (path / ".metadata").write_bytes(pickle.dumps(index))
    monkeypatch.undo()
    mend(path)
    live = zeros_like(tensors)
    load(path, live)
    assert same(live, tensors)


def elsewhere(index):
    key = next(iter(index.storage_data))
    index.storage_data[key].relative_path = "../../secret"


def transformed(index):
    next(iter(index.storage_data.values())).transform_descriptors = ["zstd"]


def lost(index):
    index.state_dict_metadata["half"].chunks.clear()


def nowhere(index):
    index.storage_data.clear()


@pytest.mark.parametrize("change", [elsewhere, transformed, lost, nowhere])
def test_an_index_must_hold_all_in_its_own_files(tmp_path, change):
    tensors = some_tensors()
    path = save(tmp_path, tensors, 1)
    index = trusted(path)
    change(index)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    mend(path)
    live = zeros_like(tensors)
    with pytest.raises(CheckpointError, match=r"cannot be used: \.metadata"):
        load(path, live)
    assert same(live, zeros_like(tensors))


def test_meta_lists_files_of_its_folder_alone(tmp_path):
    path = save(tmp_path, {"a": torch.zeros(2)}, 1)
    (tmp_path / "other").write_bytes(b"")
    content = json.loads((path / "meta.json").read_text())
    content["files"]["../other"] = [0, file_digest(tmp_path / "other")]
    (path / "meta.json").write_text(json.dumps(content))
    mend(path)
    assert "which is elsewhere" in checkpoint.newest_good(tmp_path, ALONE)[1][0]


def test_a_harmful_tensor_is_refused_without_running_it(tmp_path):
    mark = tmp_path / "mark"
    path = save(tmp_path / "checkpoints", {"a": torch.zeros(2)}, 1)
    torch.save(Evil(mark), path / "__0_0.distcp")
    index = trusted(path)
    for place in index.storage_data.values():
        place.offset, place.length = 0, (path / "__0_0.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(index))
    mend(path)
    with pytest.raises(CheckpointError, match="could not be read to its end"):
        load(path, {"a": torch.zeros(2)})
    assert not mark.exists()


def test_bytes_in_a_plan_are_refused():
    item = ReadItem(
        type=LoadItemType.BYTE_IO,
        dest_index=MetadataIndex("a"),
        dest_offsets=torch.Size([0]),
        storage_index=MetadataIndex("a"),
        storage_offsets=torch.Size([0]),
        lengths=torch.Size([1]),
    )
    with pytest.raises(CheckpointError, match="a is no tensor"):
        TensorPlanner().load_bytes(item, None)


# A full disk.

ON_A_SMALL_DISK = """
import sys
from pathlib import Path
import torch
from dino_adapters.contracts import DiskFullError
from dino_adapters.pretrain import checkpoint
from dino_adapters.runtime.world import ALONE

folder = Path(sys.argv[1]) / "states"
sizes = [10, 2000, *range(1030, 900, -3)]  # KB: what fits, far too much, and ever less
full = 0
for step, size in enumerate(sizes):
    tensors = {str(part): torch.full((size * 64,), float(step)) for part in range(4)}
    meta = checkpoint.Meta(checkpoint.Progress(step, 0.0))
    try:
        checkpoint.save(folder, tensors, meta, keep=2, world=ALONE)
    except DiskFullError as error:
        full += 1
        assert "MB are free" in str(error) and "No space left" in str(error), error
        assert [p.name for p in folder.iterdir()] == ["step_00000000"], list(folder.iterdir())
        found = {str(part): torch.ones(640) for part in range(4)}
        checkpoint.load(folder / "step_00000000", found, ALONE)
        assert not any(t.any() for t in found.values())
    else:
        if step:
            break
assert full > 9, full
assert checkpoint.newest_good(folder, ALONE) == (folder / f"step_{step:08d}", [])
print("full", full)
"""


def test_a_full_disk_of_our_own(tmp_path):
    """A disk of 1 MB that fills at every possible place, from the first tensor to meta.json."""
    script, disk = tmp_path / "script.py", tmp_path / "disk"
    script.write_text(ON_A_SMALL_DISK)
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m none '{disk}'"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small disk is not allowed here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && exec '{sys.executable}' '{script}' '{disk}'"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "full" in done.stdout


def test_torch_meets_a_full_disk(three, monkeypatch):
    folder, made = three

    def no_room(self, plan, planner):
        (Path(self.path) / "__0_0.distcp").write_bytes(b"half of it")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            # What torch's writer of archives makes of it.
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(FileSystemWriter, "write_data", no_room)
    with pytest.raises(DiskFullError, match=r"It takes 0\.0 MB, and [\d,.]+ MB are free"):
        save(folder, some_tensors(), 4)
    assert sorted(os.listdir(folder)) == [path.name for path, _ in made.values()]
    for path, tensors in made.values():
        live = zeros_like(tensors)
        load(path, live)
        assert same(live, tensors)


@pytest.mark.parametrize("where", ["write_data", "finish"])
def test_other_failures_leave_nothing_either(three, monkeypatch, where):
    folder, made = three

    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileSystemWriter, where, fail)
    with pytest.raises(CheckpointError, match=r"Permission denied.*earlier checkpoints are whole"):
        save(folder, some_tensors(), 4)
    assert sorted(os.listdir(folder)) == [path.name for path, _ in made.values()]


def test_an_interruption_stays_one(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSystemWriter, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, {"a": torch.zeros(1)}, 1)
    monkeypatch.undo()
    assert checkpoint.newest_good(tmp_path, ALONE) == (None, [])
    save(tmp_path, {"a": torch.zeros(1)}, 2)
    assert os.listdir(tmp_path) == ["step_00000002"]


def test_reasons_travel():
    error = ValueError("x")
    error.__cause__ = KeyError("y")
    found = together.reason(error)
    assert isinstance(found, RuntimeError)
    assert str(found) == "KeyError: 'y'"
    assert str(pickle.loads(pickle.dumps(found))) == str(found)


# Optimisers.


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.late = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, late):
        return self.used(x) + (self.late(x) if late else 0)


def train(module, optimizer, steps, *, late=False):
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x, late).square().mean().backward()
        optimizer.step()


def adam(module, **told):
    return torch.optim.AdamW(module.parameters(), lr=0.01, **told)


@pytest.mark.parametrize("told", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}])
def test_a_resumed_optimizer_equals_an_uninterrupted_one(tmp_path, told):
    module = Part()
    optimizer = adam(module, **told)
    train(module, optimizer, range(3))
    moments = checkpoint.flatten_optimizer(optimizer, module.named_parameters())
    assert {name.split("/")[1] for name in moments} == {"used.weight", "used.bias"}
    assert moments["optimizer/used.bias/step"] == 3
    networks = checkpoint.flatten({"student": module.state_dict()})[0]
    path = save(tmp_path, networks | moments, 3)

    other = Part()
    other.used.weight.data.zero_()
    restored = adam(other, **told)
    train(other, restored, range(7, 9), late=True)  # states that the checkpoint does not have
    blank = checkpoint.blank_optimizer(path, other.named_parameters())
    assert not any(tensor.any() for tensor in blank.values())
    load(path, checkpoint.flatten({"student": other.state_dict()})[0] | blank)
    checkpoint.restore_optimizer(restored, other.named_parameters(), blank)
    assert set(restored.state) == {other.used.weight, other.used.bias}

    for steps, late in ((range(3, 5), False), (range(5, 7), True)):
        train(module, optimizer, steps, late=late)
        train(other, restored, steps, late=late)
    assert same(dict(other.named_parameters()), dict(module.named_parameters()))
    assert same(
        checkpoint.flatten_optimizer(restored, other.named_parameters()),
        checkpoint.flatten_optimizer(optimizer, module.named_parameters()),
    )


def test_no_state_before_the_first_step(tmp_path):
    module = Part()
    optimizer = adam(module)
    assert checkpoint.flatten_optimizer(optimizer, module.named_parameters()) == {}
    path = save(tmp_path, {}, 0)
    train(module, optimizer, range(1))
    blank = checkpoint.blank_optimizer(path, module.named_parameters())
    checkpoint.restore_optimizer(optimizer, module.named_parameters(), blank)
    assert not optimizer.state


def test_states_without_a_name_or_a_tensor_are_refused():
    module = Part()
    optimizer = adam(module)
    train(module, optimizer, range(1))
    with pytest.raises(CheckpointError, match="a state of 1 parameters that have no name"):
        checkpoint.flatten_optimizer(optimizer, list(module.named_parameters())[:1])
    optimizer.state[module.used.weight]["note"] = 3
    with pytest.raises(CheckpointError, match=r"keeps note of used\.weight as int"):
        checkpoint.flatten_optimizer(optimizer, module.named_parameters())


# Nested states.

LEAVES = st.one_of(
    st.integers(-5, 5), st.floats(allow_nan=False), st.none(), st.booleans(), st.text(max_size=3)
) | st.integers(0, 3).map(torch.ones)
KEYS = st.text(st.characters(exclude_characters="/", codec="utf-8"), max_size=4)
STATES = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=3),
    lambda inner: st.dictionaries(KEYS, inner | LEAVES, max_size=3),
    max_leaves=12,
)


def equal(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b or a == b


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_nested_states_come_back(state):
    tensors, numbers = checkpoint.flatten(state)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    assert equal(checkpoint.unflatten(tensors, json.loads(json.dumps(numbers))), state)


def test_nested_names():
    one = torch.ones(1)
    state = {"students": {"": {"a.b": one}}, "centers": {}, "updates": 3}
    tensors, numbers = checkpoint.flatten(state)
    assert tensors == {"students//a.b": one}
    assert numbers == {"centers": {}, "updates": 3}


@pytest.mark.parametrize("key", ["a/b", 3])
def test_keys_without_a_name_are_refused(key):
    with pytest.raises(CheckpointError, match="texts without a slash"):
        checkpoint.flatten({"outer": {key: torch.ones(1)}})


# Several processes.


def test_over_processes(tmp_path):
    """Two shards, one whole, two shards and copies, four shards; and trouble in one of four."""
    subprocess.run([sys.executable, str(RANKS), str(tmp_path)], check=True, timeout=240)
    found = {file.stem: torch.load(file) for file in tmp_path.glob("*.pt")}
    expected = found["two"]
    assert expected["optimizer/first.weight/exp_avg"].any()
    assert expected["student/first.weight"].shape == (3, 5)
    assert not any("late" in name for name in expected if name.startswith("optimizer"))
    for stage in ("one", "two_again", "whole", "four", "four_after"):
        assert same(found[stage], expected), stage
    assert same(found["resumed"], found["uninterrupted"])
    assert not same(found["resumed"], expected)
