"""Whole files or none."""

import json
import os
import stat

import pytest

from dino_adapters.runtime.files import atomic, file_digest, json_digest, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "kept.txt"
    write_text(path, "old")

    def fail_halfway():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyError("disk full")

    with pytest.raises(KeyError):
        fail_halfway()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.txt"]


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_json_is_read_back_and_nan_refused(tmp_path):
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ü": [1, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert json.loads((tmp_path / "a.json").read_text()) == {"ü": [1, None]}


def test_digests_tell_content_and_nothing_else(tmp_path):
    (tmp_path / "a").write_bytes(b"same")
    (tmp_path / "b").write_bytes(b"same")
    (tmp_path / "c").write_bytes(b"other")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b") != file_digest(tmp_path / "c")
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1}) != json_digest({"a": 1})
