"""Continued pretraining: heads first on a frozen backbone, then a ramp; adapters; the anchor."""

import pytest
import torch
from safetensors.torch import load_file

from dino_adapters.backbones import load_backbone
from dino_adapters.contracts import RecipeError
from dino_adapters.pretrain import pretrain
from dino_adapters.pretrain.assemble import assemble
from dino_adapters.pretrain.loop import one_step
from dino_adapters.pretrain.optim import Timetable
from dino_adapters.runtime.runfolder import RunFolder

HELD = {"schedule": {"freeze_backbone": 0.25, "backbone_ramp": 0.25, "warmup": 0.0}, "steps": 12}


def copies(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before, module):
    return {name for name, tensor in module.state_dict().items() if not tensor.equal(before[name])}


def stepped(run, count=1):
    table = Timetable(run.recipe)
    for step, batch in run.batches():
        one_step(run, run.crops(step, batch), table.at(step))
        if step + 1 == count:
            return


def test_heads_learn_first_and_nothing_is_computed_backwards(tiny, tmp_path, monkeypatch):
    run = assemble(tiny(**HELD), RunFolder(tmp_path / "run"), resume=False)
    backbone, head = (run.learner.students[""][name] for name in ("backbone", "dino_head"))
    before, heads = copies(backbone), copies(head)
    table = Timetable(run.recipe)
    graphs = []
    compare = run.learner.compare

    def watched(*given):
        found = compare(*given)
        graphs.append(found.student.cls.requires_grad)
        return found

    monkeypatch.setattr(run.learner, "compare", watched)
    for step, batch in run.batches():
        one_step(run, run.crops(step, batch), table.at(step))
        if step == 2:
            assert not moved(before, backbone)
            assert moved(heads, head)
            assert not any(p in run.optimizer.state for p in backbone.parameters())
    assert graphs == [False] * 3 + [True] * 9
    assert moved(before, backbone)


def test_the_backbones_rate_rises_from_nothing(tiny):
    table = Timetable(tiny(**HELD))
    shares = [table.at(step).backbone_share for step in range(12)]
    assert shares == pytest.approx([1.0] * 3 + [0.25, 0.5, 0.75] + [1.0] * 6)
    assert [table.at(step).frozen for step in range(12)] == [True] * 3 + [False] * 9


def test_new_bands_learn_their_filters_while_the_backbone_stands(tiny, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    folder = tmp_path / "four"
    folder.mkdir()
    for index in range(6):
        with rasterio.open(
            folder / f"{index}.tif",
            "w",
            width=40,
            height=40,
            count=4,
            dtype="uint8",
            transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
            crs="EPSG:32632",
        ) as opened:
            opened.write(torch.randint(0, 255, (4, 40, 40)).byte().numpy())
    three = pretrain(tiny(steps=1), RunFolder(tmp_path / "three"), quiet=True)
    recipe = tiny(
        data={"source": str(folder), "bands": ("red", "green", "blue", "nir")},
        model={"source": str(three), "architecture": {}},
        **HELD,
    )
    run = assemble(recipe, RunFolder(tmp_path / "run"), resume=False)
    backbone = run.learner.students[""]["backbone"]
    before = copies(backbone)
    stepped(run, 2)
    names = moved(before, backbone)
    assert names
    assert all(name.startswith("patch_embed.") for name in names)


def test_momentum_spans_a_share_of_the_run(tiny):
    table = Timetable(tiny(schedule={"momentum_span": 0.1, "momentum": (0.996, 1.0)}, steps=200))
    assert table.at(0).momentum == pytest.approx(1 - 1 / 20)
    assert table.at(199).momentum == pytest.approx(1.0)


def test_adapters_train_alone_and_are_merged_on_export(tiny, tmp_path):
    start = pretrain(tiny(steps=1), RunFolder(tmp_path / "start"), quiet=True)
    recipe = tiny(
        model={"source": str(start), "architecture": {}}, lora={"rank": 2}, optim={"lr": 0.05}
    )
    folder = RunFolder(tmp_path / "run")
    run = assemble(recipe, folder, resume=False)
    backbone = run.learner.students[""]["backbone"]
    held = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert "blocks.0.mlp.fc1.weight" in held
    assert all(
        run.learner.averages[""]["backbone"].get_parameter(name) is backbone.get_parameter(name)
        for name in held
    )  # shared: one copy in memory
    export = pretrain(recipe, folder, overwrite=True, quiet=True)
    ours, theirs = (load_file(path / "model.safetensors") for path in (export, start))
    assert set(ours) == set(theirs)
    changed = {name for name, tensor in ours.items() if not tensor.equal(theirs[name])}
    assert "blocks.0.attn.qkv.weight" in changed
    assert any(name.startswith("blocks.1.mlp") for name in changed)
    assert not any(name.startswith(("blocks.0.mlp", "blocks.0.attn.proj")) for name in changed)
    images = torch.rand(2, 3, 24, 24)
    assert load_backbone(export)(images).cls.isfinite().all()


def test_adapters_resume_to_the_bit(tiny, tmp_path, interrupted):
    recipe = tiny(lora={"rank": 2}, schedule={"freeze_backbone": 0.3})
    whole = pretrain(recipe, RunFolder(tmp_path / "a"), quiet=True)
    folder = RunFolder(tmp_path / "b")
    interrupted(recipe, folder, step=5)
    again = load_file(pretrain(recipe, folder, resume=True, quiet=True) / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(again[name], tensor), name


def test_adapters_of_a_convolutional_network_are_refused(tiny, tmp_path):
    other = {"model": {"source": "resnet10t", "architecture": {}}, "lora": {}}
    recipe = tiny(crops={"global_size": 64, "local_size": 32}).changed(other)
    with pytest.raises(RecipeError, match="blocks"):
        pretrain(recipe, RunFolder(tmp_path / "run"), quiet=True)


def test_the_anchor_holds_class_tokens_near_the_start(tiny, tmp_path):
    def gap(weight):
        recipe = tiny(anchor={"cls_weight": weight}, optim={"lr": 0.01}, steps=30)
        folder = RunFolder(tmp_path / f"w{weight}")
        pretrain(recipe, folder, quiet=True)
        return folder.rows()[-1]["anchor"]

    loose, tight = gap(0.0), gap(30.0)
    assert tight < 0.5 * loose


@pytest.mark.parametrize("section", [{"lora": {}}, {"anchor": {}}, {"gate": {}}])
def test_what_has_no_part_in_a_distillation_is_refused(tiny, tmp_path, section):
    teacher = pretrain(tiny(steps=1), RunFolder(tmp_path / "t"), quiet=True)
    told = {"teacher": str(teacher), "students": {"s": {"source": "vitmicro8"}}}
    with pytest.raises(RecipeError, match="Leave it out"):
        pretrain(tiny(distill=told, **section), RunFolder(tmp_path / "run"), quiet=True)
