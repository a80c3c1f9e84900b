"""inspect and embed on a real folder."""

import json


def test_inspect_for_people(run, photos):
    result = run("inspect", photos, "--labels", "folder", "--quiet")
    assert result.exit_code == 0, result.output
    for words in ("37", "40 x 32", "uint8", "red, green, blue", "broken.png", "Classes"):
        assert words in result.stdout
    assert "What to do:" in result.stdout


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
