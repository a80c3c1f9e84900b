"""Kind `losses_distributed`: terms that couple images, over real processes that speak gloo."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Settings
from ..gloo_ranks import over_gloo

LOSSES = "dino_adapters.pretrain.losses"
TARGETS = "dino_adapters.pretrain.targets"


def read(case: Case) -> None:
    for spec in case.settings["config"]["specs"]:
        _read_spec(case, spec)


def _read_spec(case: Case, spec: Settings) -> None:
    number, size, batch = spec["index"], spec["world_size"], spec["batch_per_rank"]
    jobs: dict[str, dict[str, Any]] = {}

    tokens = _rows(case, f"in/{number}/koleo", [batch] * size, spec["dim"])
    for group in spec["koleo_group_sizes"]:
        for most in spec["koleo_topk"]:
            jobs[f"koleo_group{group}_top{most}"] = {
                "call": f"{LOSSES}:koleo_loss",
                "inputs": [part.requires_grad_() for part in tokens],
                "settings": {"group": group, "neighbours": most},
            }
    crops, masked = [2 * batch] * size, spec["masked_patches_per_rank"]
    for kind, counts, width in (("dino", crops, spec["K"]), ("ibot", masked, spec["K_ibot"])):
        jobs[f"{kind}_sinkhorn"] = {
            "call": f"{TARGETS}:sinkhorn_knopp",
            "inputs": _rows(case, f"in/{number}/{kind}_teacher_logits", counts, width),
            "settings": {"temperature": spec["teacher_temp"]},
        }
    jobs["center"] = {
        "call": f"{TARGETS}:update_center",
        "first": [torch.zeros(1, spec["K"], dtype=case.dtype)],
        "inputs": _rows(case, f"in/{number}/center_teacher", crops, spec["K"]),
        "settings": {"momentum": spec["center_momentum"]},
    }
    jobs["count_after"] = {
        "call": "ranks:sum",
        "inputs": [torch.tensor([count]) for count in masked],
        "settings": {},
    }

    with TemporaryDirectory() as folder:
        found = over_gloo(list(jobs.values()), size, Path(folder))
    for name, by_rank in zip(jobs, found, strict=True):
        key, results = f"{number}/{name}", [result for result, _ in by_rank]
        if name.startswith("koleo"):
            case.check(f"out/{key}", torch.stack(results))
            case.check(f"grad/{key}", torch.cat([gradient for _, gradient in by_rank]))
        elif name.endswith("sinkhorn"):
            case.check(f"out/{key}", torch.cat(results))
        else:
            for result in results:  # the same on all ranks
                case.check(f"out/{key}", result)


def _rows(case: Case, key: str, counts: list[int], width: int) -> list[Tensor]:
    stored = case.tensor(key)
    assert list(stored.shape) == [sum(counts), width]
    return list(stored.split(counts))
