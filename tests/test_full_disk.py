"""Disks that fill up: a timeline, copies of the output, a settings record. The job goes on, and no file is left in halves."""

import json
import logging
import os
import subprocess
import sys

import pytest
from support_launch import environ_with, mark_of, run

from commlib.settings import Settings
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


@pytest.fixture(name="mark")
def make_mark(request):
    yield from mark_of(request)


def fill(disk):
    """Writes until nothing goes any more."""
    with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(b"x" * 4096):
            pass


def test_a_settings_record_is_kept_where_its_successor_has_no_room(small_disk):
    record = Settings(algorithms=(("allreduce", "ring"),))
    record.save(small_disk / "record")
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        record.replace(spin_us=7).save(small_disk / "record")
    assert Settings.load(small_disk / "record") == record and sorted(os.listdir(small_disk)) == ["filler", "record"]


def test_what_was_tuned_is_shown_where_it_cannot_be_kept(small_disk, mark):
    fill(small_disk)
    ran = run("-np", "2", sys.executable, "-m", "commlib", "tune", "--budget", "0.3", "--largest", "4096",
              "--output", str(small_disk / "record"), env=environ_with(mark), deadline_s=60.0)  # fmt: skip
    assert ran.returncode == 1 and "No space left" in ran.err, ran.err
    shown = next(line for line in ran.out.splitlines() if line.startswith("{"))
    assert Settings.from_json(shown).gamma_s_per_byte > 0
    assert os.listdir(small_disk) == ["filler"]


def test_a_disk_that_fills_up_under_the_output_costs_the_copy_and_not_the_job(small_disk, mark):
    ran = run("-np", "1", "--output-filename", str(small_disk), "seq", "1", "30000", env=environ_with(mark))
    assert ran.returncode == 0 and "No space left" in ran.err, ran.err
    assert ran.out.split() == [str(number) for number in range(1, 30001)]
