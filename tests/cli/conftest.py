"""A small folder of class images, and a way to run commands."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dino_adapters.cli.main import app

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture
def photos(tmp_path):
    """36 noisy pictures of 40 x 32 pixels in three class folders, one file broken."""
    folder = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(12):
            noise = generator.normal(0, 40, (32, 40, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    (folder / "red" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def run():
    """Runs words as a command; the result has exit_code, stdout and stderr."""
    runner = CliRunner()

    def call(*words):
        return runner.invoke(app, [str(word) for word in words])

    return call
