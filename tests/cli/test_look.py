"""inspect and embed on a real folder."""

import json

import numpy as np
from PIL import Image

from dino_adapters.data.audit import METHOD


def test_inspect_for_people(run, photos):
    result = run("inspect", photos, "--labels", "folder", "--quiet")
    assert result.exit_code == 0, result.output
    for words in ("37", "40 x 32", "uint8", "red, green, blue", "broken.png", "Classes"):
        assert words in result.stdout
    assert "What to do:" in result.stdout


def test_inspect_says_titles_and_method_in_one_line(run, tmp_path):
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6), dtype=np.uint8))
    smooth = coarse.resize((60, 50), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png")
    smooth.save(tmp_path / "b.jpg", quality=80)
    lines = run("inspect", tmp_path, "--quiet").stdout.splitlines()
    assert "Pairs that look alike: 1" in lines
    assert f"Method: {METHOD}." in lines


def test_inspect_names_the_options_of_the_command(run, tmp_path):
    Image.fromarray(np.full((40, 40), 2999, np.uint16)).save(tmp_path / "a.png")
    shown = run("inspect", tmp_path, "--quiet").stdout
    assert "data.value_range=[0,4095] for 12-bit" in shown
    assert "--value-range 0,4095" in shown
    assert (
        "--value-range" not in run("inspect", tmp_path, "--quiet", "--value-range", "0,4095").stdout
    )


def test_inspect_for_machines(run, photos):
    result = run("inspect", photos, "--json")
    told = json.loads(result.stdout)
    assert told["count"] == 37
    assert told["unreadable"][0][0] == "red/broken.png"


def test_inspect_refuses_odd_options(run, photos):
    result = run("inspect", photos, "--value-range", "7")
    assert result.exit_code == 2
    assert "Give two numbers" in result.stderr


def test_embed_computes_once(run, photos, tmp_path):
    words = ("embed", "vitmicro8", photos, "--size", 32, "--out", tmp_path / "store", "--json")
    first = run(*words)
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert told["images"] == 36
    assert any("broken.png" in line for line in told["notices"])
    again = run(*words[:-1])
    assert "0 of 37 images" in again.stderr or "1 of 37" in again.stderr
    assert "36 of 37 images, 96 numbers each" in again.stdout


def test_embed_refuses_a_wrong_fit_and_size(run, photos, tmp_path):
    out = ("--out", tmp_path / "store")
    assert "Use crop or squash" in run("embed", "vitmicro8", photos, "--fit", "pad", *out).stderr
    result = run("embed", "vitmicro8", photos, "--size", 33, *out)
    assert result.exit_code == 6
    assert "The nearest is 32" in result.stderr
