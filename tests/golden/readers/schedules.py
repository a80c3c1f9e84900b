"""Kind `schedules`: both families with scaling, frozen prototypes and steps after the end."""

import torch

from dino_adapters.pretrain.schedules import scaled_rate, warmup_cosine

from ..case import Case, Settings
from ..tables import RULES, at, block_tables, old_tables

EXACT = 1e-12
"""The case allows rounding of float64 only."""


def read(case: Case) -> None:
    config = case.settings["config"]
    for settings in config["old"]:
        _read_old(case, settings)
    for settings in config["v2"]:
        _read_blocks(case, settings)
    for settings in config["raw"]:
        table = warmup_cosine(
            settings["total_iterations"],
            start=settings["start"],
            peak=settings["peak"],
            end=settings["end"],
            warmup=settings["warmup_iterations"],
            cosine=settings["cosine_iterations"],
        )
        _check(case, f"out/raw_{settings['index']}", table)


def _check(case: Case, key: str, table: list[float]) -> None:
    case.check(key, torch.tensor(table, dtype=torch.float64), bound=EXACT)


def _read_old(case: Case, settings: Settings) -> None:
    optim, teacher = settings["optim"], settings["teacher"]
    epoch = settings["OFFICIAL_EPOCH_LENGTH"]
    teacher.skip("in_chans", because="no part of a schedule")
    assert optim["epochs"] * epoch == settings["total_iterations"]
    batch = settings["batch_size_per_gpu"] * settings["world_size"]
    peak = scaled_rate(optim["lr_in_config"], batch, RULES[optim["scaling_rule"]])
    assert abs(peak - optim["lr_after_scaling"]) <= EXACT * peak
    for name, (table, beyond) in old_tables(optim, teacher, epoch, peak=peak).items():
        values = [at(table, step, beyond=beyond) for step in range(settings["stored_values"])]
        _check(case, f"out/old{settings['index']}/{name}", values)


def _read_blocks(case: Case, settings: Settings) -> None:
    epoch = settings["OFFICIAL_EPOCH_LENGTH"]
    tables = block_tables(
        settings["schedules"],
        epoch,
        settings["epochs"] * epoch,
        batch=settings["batch_size_per_gpu"] * settings["world_size"],
        rule=settings["scaling_rule"],
    )
    for name, table in tables.items():
        _check(case, f"out/v2_{settings['index']}/{name}", table)
