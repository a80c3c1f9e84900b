"""Every recipe file makes its first two steps in each phase, with nothing changed but sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_adapters.pretrain import pretrain
from dino_adapters.pretrain.sizes import snapshot_steps
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.read import read_recipe
from dino_adapters.runtime.runfolder import RunFolder

FOLDER = Path(__file__).parents[2] / "pretrain"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py"))
CONTINUED = ("demo:", "give ")
"""Sources that stand for trained weights."""
HEAVY = {"gram", "vit_large"}
"""Some seconds each on a CPU."""
STEPS = 2
HEADS = {"prototypes": 32, "hidden_dim": 16, "bottleneck_dim": 8}
SMALLER: dict[str, dict[str, Any]] = {
    "data": {"workers": 0},
    "crops": {"local_count": 2},
    "objective": {**HEADS, "koleo_group": None},
    "optim": {"batch_size": 2},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    for index in range(6):
        cells = draws.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((112, 96)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(pictures, tmp_path_factory):
    """An export with heads, in patches of 16 px like the teachers that the recipes name."""
    recipe = PretrainRecipe.model_validate(
        {
            "data": {"source": str(pictures), "workers": 0},
            "model": {"source": "vittiny16", "architecture": {"depth": 1}},
            "objective": HEADS,
            "optim": {"batch_size": 2},
            "steps": 1,
            "device": "cpu",
        }
    )
    return pretrain(recipe, RunFolder(tmp_path_factory.mktemp("teacher") / "run"), quiet=True)


def smaller(recipe: PretrainRecipe, pictures: Path, teacher: Path) -> PretrainRecipe:
    """The recipe with two steps a phase, shallow networks, small heads and few images."""
    told = recipe.model_dump()
    for name, changes in SMALLER.items():
        told[name] |= changes
    told["data"]["source"] = str(pictures)
    told |= {"steps": STEPS, "device": "cpu"}
    if told["model"]["source"].startswith(CONTINUED):
        told["model"]["source"] = str(teacher)
        told["schedule"] |= {"freeze_backbone": 0.0, "backbone_ramp": 0.0}  # no room in two steps
    if told["lora"] is not None:
        told["lora"]["open_blocks"] = 0  # there is one
    if told["distill"] is None:
        make_shallow(told["model"])
    else:
        told["distill"]["teacher"] = str(teacher)
    for part in (told, *told["phases"]):
        for student in ((part["distill"] or {}).get("students") or {}).values():
            make_shallow(student)
    for phase in told["phases"]:
        phase["steps"] = STEPS
        phase["optim"].pop("batch_size", None)
        mixture = phase["crops"].get("mixture", ())
        if any(sizes["global_size"] >= 512 for sizes in mixture):
            phase["crops"]["mixture"] = [quarter(sizes) for sizes in mixture]
        if "snapshots" in phase["checkpoint"]:
            phase["checkpoint"]["snapshots"] = 1  # after step 1 of 2
        gram = phase["gram"] if isinstance(phase["gram"], dict) else {}
        name, at, _ = gram.get("teacher", "").partition("@")
        if at:
            gram["teacher"] = f"{name}@1"
    return PretrainRecipe.model_validate(told)


def make_shallow(model: dict[str, Any]) -> None:
    """One block for the transformers of our catalogue; thin stages for its ConvNeXts."""
    if model["source"].startswith("vit"):
        model["architecture"] = {**model.get("architecture", {}), "depth": 1}
    elif model["source"].startswith("cnx"):
        model["architecture"] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


def quarter(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes divided by 4, up to whole patches of 16 px."""
    sides = {key: -(-sizes[key] // 64) * 16 for key in ("global_size", "local_size", "gram_size")}
    return {**sizes, **sides}


def marked(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else [])


@pytest.mark.parametrize("name", [marked(name) for name in RECIPES])
def test_a_recipe_makes_its_first_steps(name, pictures, teacher, tmp_path):
    whole = read_recipe(FOLDER / f"{name}.py", PretrainRecipe, ["data.source=anywhere"])
    recipe = smaller(whole, pictures, teacher)
    run = RunFolder(tmp_path / "run")
    export = pretrain(recipe, run, quiet=True)
    phases = [run.path / "phases" / f"{i}_{p.name}" for i, p in enumerate(recipe.phases, 1)]
    for folder in phases or [run.path]:
        rows = RunFolder(folder).rows_with("loss")
        assert len(rows) == STEPS, folder
        assert all(np.isfinite(row["loss"]) for row in rows), folder
    assert any(export.rglob("card.json"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_snapshot_that_gram_names_is_kept(name):
    """Checked on the whole recipe: shortening it changes the steps of its snapshots."""
    recipe = read_recipe(FOLDER / f"{name}.py", PretrainRecipe, ["data.source=anywhere"])
    plans = {phase.name: plan for phase, plan in recipe.plans()}
    for plan in plans.values():
        named, at, step = ("" if plan.gram is None else plan.gram.teacher).partition("@")
        if at:
            assert int(step) in snapshot_steps(plans[named])
