"""A timeline on a disk that fills up: the job goes on, the file stays valid JSON, and the log says what happened."""

import json
import logging
import os
import subprocess

import pytest

from commlib.timeline import Timeline


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs the right to mount")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_ends_the_timeline_and_nothing_else(small_disk, caplog):
    timeline = Timeline(small_disk / "trace.json", 0)
    with caplog.at_level(logging.WARNING, "commlib"):
        for number in range(3000):
            timeline.span(f"span {number}", "compute", number, number + 0.5)
            if number % 50 == 0:
                timeline.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "No space left" in caplog.text
    with open(timeline.part_path, encoding="utf-8") as file:
        names = [event["name"] for event in json.load(file)]
    assert "span 0" in names and "span 2999" not in names
