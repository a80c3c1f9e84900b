"""Killed at any moment, the same command goes on to the same weights, bit by bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dino_adapters.pretrain import pretrain
from dino_adapters.runtime.runfolder import RunFolder

SCRIPT = Path(__file__).with_name("train_rank.py")
KILLS = 10


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ten_kills_change_nothing(tiny, tmp_path, workers):
    """SIGKILL at random moments: between steps, inside them, and while states are written."""
    recipe = tiny(steps=400, checkpoint={"every_steps": 7}, monitor={"every": 0.25, "images": 6})
    whole = load_file(pretrain(recipe, RunFolder(tmp_path / "a"), quiet=True) / "model.safetensors")
    told, folder = tmp_path / "b.json", RunFolder(tmp_path / "b")
    told.write_text(
        json.dumps(recipe.changed({"data": {"workers": workers}}).model_dump(mode="json"))
    )
    draws, command = random.Random(workers), [sys.executable, str(SCRIPT), told, folder.path]
    reached = []
    for _ in range(KILLS):
        before = len(folder.rows())
        process = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
        # Well into the run: imports take most of the first seconds.
        while process.poll() is None and len(folder.rows()) <= before:
            time.sleep(0.01)
        time.sleep(draws.uniform(0.0, 1.0))
        assert process.poll() is None, "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        reached.append(folder.rows()[-1]["step"])
    assert len(set(reached)) > KILLS // 2  # it got on in between
    subprocess.run([str(word) for word in command], check=True, stderr=subprocess.DEVNULL)
    again = load_file(folder.export / "model.safetensors")
    assert set(again) == set(whole)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert [row["step"] for row in folder.rows_with("loss")] == list(range(400))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_job_and_the_job_goes_on(tiny, tmp_path, killed):
    """torchrun starts all processes again when one dies, and they go on from the last state."""
    recipe = tiny(optim={"batch_size": 8}, steps=12)
    told, folder = tmp_path / "r.json", RunFolder(tmp_path / "r")
    told.write_text(json.dumps(recipe.model_dump(mode="json")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = [*launcher, "--nproc-per-node=2", "--max-restarts=1", SCRIPT, told, folder.path]
    with subprocess.Popen([str(w) for w in job], stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and len(folder.rows()) < 5:
                time.sleep(0.01)
            children = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
            ).stdout.split()
            os.kill(int(children[killed]), signal.SIGKILL)
            _, said = process.communicate(timeout=300)
        finally:
            process.terminate()  # torchrun ends its processes, too
    assert process.returncode == 0, said[-2000:]
    assert [row["step"] for row in folder.rows_with("loss")] == list(range(12))
    alone = RunFolder(tmp_path / "alone")
    pretrain(recipe, alone, quiet=True)
    ours, theirs = (load_file(f.export / "model.safetensors") for f in (folder, alone))
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) < 0.02, name
