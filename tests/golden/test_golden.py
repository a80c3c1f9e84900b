"""Every golden case in fp32 and in float64: a wrong formula stays in both, noise goes."""

import json
import os
from pathlib import Path

import pytest
import torch

from .case import Case
from .readers import READERS

FOLDER = Path(
    os.environ.get("DINO_ADAPTERS_GOLDEN")
    or Path(__file__).resolve().parents[2].parent / "shared" / "golden"
)
ABSENT = f"no golden cases in {FOLDER}; name their folder in DINO_ADAPTERS_GOLDEN"
CASES = sorted(FOLDER.glob("*.json")) or [
    pytest.param(FOLDER, marks=pytest.mark.skip(reason=ABSENT))
]

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_case(file: Path, dtype: torch.dtype, record_property) -> None:
    kind = json.loads(file.read_text())["kind"]
    if kind not in READERS:
        pytest.skip(f"no reader for kind {kind} yet")
    case = Case(file, dtype)
    READERS[kind](case)
    worst = case.finish()
    record_property("worst", worst)
    print(f"{case.name}: {worst}")
