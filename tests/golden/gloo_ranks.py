"""Runs functions that take `ranks` in real processes over gloo: `python gloo_ranks.py FOLDER`.

A file of its own, run by its path: the processes are started by spawning, so each reads this file
again, and must find it without pytest's imports. `FOLDER/jobs.pt` holds a list of

    {"call": "module:function", "inputs": one tensor per rank, "settings": {...}, "first": [...]}

Each rank calls `function(*first, its input, **settings, ranks=ProcessGroup())`, and, where the
input requires a gradient, runs backward on its own result. `FOLDER/results.pt` then holds, for
each job, a list over ranks of `(result, gradient or None)`.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

LIMIT_S = 120


def work(rank: int, size: int, folder: str) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from dino_adapters.pretrain.ranks import ProcessGroup

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    ranks = ProcessGroup()
    found: list[tuple[Any, Any]] = []
    for job in torch.load(f"{folder}/jobs.pt", weights_only=True):
        module, name = job["call"].split(":")
        call = name if module == "ranks" else getattr(import_module(module), name)
        own = job["inputs"][rank]
        x = own.detach().clone().requires_grad_(own.requires_grad)
        if isinstance(call, str):
            result = getattr(ranks, call)(x)
        else:
            result = call(*job.get("first", []), x, **job.get("settings", {}), ranks=ranks)
        if x.requires_grad:
            # Squares, weighed by rank, so that a gradient that went to another row shows.
            (result if result.ndim == 0 else (result.square() * (rank + 1)).sum()).backward()
        found.append((result.detach(), x.grad))
    torch.save(found, f"{folder}/found{rank}.pt")
    dist.destroy_process_group()


def over_gloo(jobs: list[dict[str, Any]], size: int, folder: Path) -> list[list[tuple[Any, Any]]]:
    """Results of all jobs, by job and rank, from `size` processes of their own.

    Raises:
        subprocess.CalledProcessError: A process failed.
        subprocess.TimeoutExpired: They were not done in two minutes.
    """
    import subprocess

    import torch

    torch.save(jobs, folder / "jobs.pt")
    command = [sys.executable, __file__, str(folder), str(size)]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    by_rank = [torch.load(folder / f"found{rank}.pt") for rank in range(size)]
    return [list(results) for results in zip(*by_rank, strict=True)]


if __name__ == "__main__":
    from multiprocessing import get_context

    context = get_context("spawn")
    count = int(sys.argv[2])
    processes = [
        context.Process(target=work, args=(rank, count, sys.argv[1]), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
    sys.exit(any(process.exitcode != 0 for process in processes))
