"""The runner itself: it must notice what is wrong, and what nobody looked at."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .case import Case, distance


@pytest.fixture
def case(tmp_path: Path) -> Case:
    tensors = {
        "in/x": torch.tensor([1.0, 2.0]),
        "out/y": torch.tensor([2.0, 4.0]),
        "out/n": torch.tensor([1, 2]),
    }
    settings = {
        "name": "made",
        "kind": "made",
        "notes": "not read by anyone",
        "config": {"factor": 2.0, "deep": {"inner": 1}, "many": [{"a": 1}, {"a": 2}]},
        "steps": 3,
        "tolerance": {"suggested_max_rel_to_absmax": {"out": 1e-5}},
    }
    save_file(tensors, tmp_path / "made.safetensors")
    (tmp_path / "made.json").write_text(json.dumps(settings))
    return Case(tmp_path / "made.json", torch.float64)


def read_all(case: Case, *, error: float = 0.0) -> None:
    config = case.settings["config"]
    assert config["deep"]["inner"] == 1
    assert [item["a"] for item in config["many"]] == [1, 2]
    assert case.settings["steps"] == 3
    case.check("out/y", case.tensor("in/x") * config["factor"] * (1 + error))
    case.check("out/n", torch.tensor([1, 2]))


def test_a_case_read_in_full_passes(case: Case) -> None:
    read_all(case, error=1e-6)
    assert case.tensor("in/x").dtype == torch.float64
    assert case.finish() == "out 1.0e-06 (out/y)"


def test_a_wrong_result_fails(case: Case) -> None:
    read_all(case, error=1e-4)
    with pytest.raises(AssertionError, match=r"out/y: 1\.00e-04 over 1e-05"):
        case.finish()


def test_a_wrong_integer_fails(case: Case) -> None:
    read_all(case)
    case.check("out/n", torch.tensor([1, 3]))
    with pytest.raises(AssertionError, match="out/n"):
        case.finish()


def test_a_tensor_that_nobody_read_fails(case: Case) -> None:
    config = case.settings["config"]
    config.skip("deep", "many", because="not of this test")
    case.settings.skip("steps", because="not of this test")
    case.check("out/y", torch.tensor([1.0, 2.0]) * config["factor"])
    with pytest.raises(AssertionError) as caught:
        case.finish()
    assert "tensor in/x" in str(caught.value)
    assert "tensor out/n" in str(caught.value)


def test_a_setting_that_nobody_read_fails(case: Case) -> None:
    case.tensor("in/x")
    case.tensor("out/y")
    case.check("out/n", torch.tensor([1, 2]))
    config = case.settings["config"]
    assert config["deep"] is not None
    assert config["many"][0]["a"] == 1
    with pytest.raises(AssertionError) as caught:
        case.finish()
    for path in ("config.factor", "config.deep.inner", "config.many[1].a", "steps"):
        assert f"setting {path}" in str(caught.value)


def test_distance_is_relative_to_the_largest_value() -> None:
    expected = torch.tensor([0.0, -4.0])
    assert distance(expected + torch.tensor([0.1, 0.0]), expected) == pytest.approx(0.025)
    assert distance(torch.tensor([0.1]), torch.tensor([0.0])) == pytest.approx(0.1)
    assert distance(torch.zeros(3), torch.zeros(2)) == float("inf")
    assert distance(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert distance(torch.tensor([float("inf")]), torch.tensor([1.0])) == float("inf")
    assert distance(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0
