"""Files are compared with their checksums once, and again as soon as anything about them is new."""

import os
import shutil

import pytest
from triptych_common.storage.verified import VERIFIED, verify_once


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        (tmp_path / "zoo").mkdir(exist_ok=True)
        (tmp_path / "zoo" / name).write_bytes(name.encode() * 100)
    return tmp_path / "zoo"


def read(folder, **checksums):
    """Names of the files that were read."""
    names = []
    verify_once(folder, {"a": "1", "b": "2"} | checksums, names.append)
    return names


def test_each_file_is_read_once(folder):
    assert read(folder) == ["a", "b"]
    assert read(folder) == []


def test_a_file_is_read_again_if_content_time_or_checksum_changed(folder):
    read(folder)
    status = (folder / "a").stat()
    (folder / "a").write_bytes(b"A" * 100)
    os.utime(folder / "a", ns=(status.st_atime_ns, status.st_mtime_ns))  # as a program that hides its change
    assert read(folder) == ["a"]
    assert read(folder, b="3") == ["b"]


def test_a_copy_is_read_again_though_its_record_came_along(folder):
    read(folder)
    shutil.copytree(folder, folder.parent / "copy")  # keeps the times of modification
    assert read(folder.parent / "copy") == ["a", "b"]


def test_what_was_whole_before_the_damaged_file_is_remembered(folder):
    def verify(name):
        if name == "b":
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        verify_once(folder, {"a": "1", "b": "2"}, verify)
    assert read(folder) == ["b"]


def test_a_damaged_record_and_a_file_in_its_place_only_cost_time(folder):
    read(folder)
    (folder / VERIFIED).write_text('{"a": 1}')
    assert read(folder) == ["a", "b"]
    (folder / VERIFIED).unlink()
    (folder / VERIFIED).mkdir()
    assert read(folder) == ["a", "b"] == read(folder)


def test_every_damaged_file_is_listed_where_a_list_is_given(folder):
    def verify(name):
        raise ValueError(f"{name} differs")

    damaged = {}
    verify_once(folder, {"a": "1", "b": "2"}, verify, damaged=damaged)
    assert damaged == {"a": "a differs", "b": "b differs"}
    assert read(folder) == ["a", "b"]
