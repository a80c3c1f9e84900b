"""What must start quickly, or without heavy libraries, does. No test here measures time."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "monai",
    "segmentation_models_pytorch",
    "albumentations",
    "rasterio",
    "transformers",
    "matplotlib",
)
ALSO_HEAVY = ("timm", "torchvision", "sklearn", "scipy", "cv2", "mmengine", "pydantic")


def loaded_after(code: str) -> set[str]:
    """Top-level names of modules that are loaded after running `code` in a fresh process."""
    probe = (
        f"{code}\nimport json, sys\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def without(*names: str) -> str:
    """Code that makes these modules impossible to import."""
    return (
        "import sys\n"
        "class Wall:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {names!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Wall())\n"
    )


def test_the_package_loads_nothing_heavy():
    assert not loaded_after("import dino_adapters") & {*HEAVY, *ALSO_HEAVY}


def test_the_command_line_loads_nothing_heavy():
    assert not loaded_after("import dino_adapters.cli.main") & {*HEAVY, *ALSO_HEAVY}


@pytest.mark.parametrize(
    "module",
    [
        "contracts",
        "runtime.lookup",
        "runtime.console",
        "runtime.files",
        "runtime.runfolder",
        "recipes.read",
        "recipes.pretrain",
        "recipes.task",
        "data.audit",
    ],
)
def test_these_modules_leave_torch_alone(module):
    assert not loaded_after(f"import dino_adapters.{module}") & {*HEAVY, "timm", "sklearn"}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["pretrain", "--help"]])
def test_help_answers_without_torch(words):
    code = without(*HEAVY, "timm", "sklearn") + (
        f"sys.argv = ['dino-adapters', *{words!r}]\nfrom dino_adapters.cli.main import run\nrun()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_wall_stands():
    """Otherwise the test above would prove nothing."""
    code = without("torch") + "import torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr
