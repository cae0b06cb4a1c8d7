"""The commrun command: options in, exit code out."""
from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import List, Optional

from commlib.launch.job import Job
from commlib.launch.options import parse
from commlib.settings import Settings

WRONG_OPTION = 2
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # what shells answer


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs commrun; returns its exit code: 0, the first failed rank's code, or 128 + signal.

    Args:
        arguments: the command line without the program name; None: the process's own.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    program = options.command[0]
    if shutil.which(program) is None:
        return _complain(program)
    mistake = _mistake(options)
    if mistake is not None:
        print(f"commrun: {mistake}", file=sys.stderr)
        return WRONG_OPTION
    return Job(options, dict(os.environ)).run()


def _mistake(options: argparse.Namespace) -> Optional[str]:
    """What is wrong with the files that the options name, and what to do; None: nothing. Makes the output folder."""
    try:
        if options.output_filename is not None:
            os.makedirs(options.output_filename, exist_ok=True)
    except OSError as error:
        return f"--output-filename {options.output_filename}: {error.strerror}; name a folder that can be written"
    try:
        if options.settings is not None:
            Settings.load(options.settings)
    except (OSError, ValueError) as error:
        return f"--settings {options.settings}: {error}; name a file that `commlib tune` or Settings.save wrote"
    return None


def _complain(program: str) -> int:
    """Says why a command cannot be started."""
    if not os.path.isfile(program):
        print(f"commrun: {program}: command not found; give a program on PATH or a path to one", file=sys.stderr)
        return NOT_FOUND
    advice = f"python {program}" if program.endswith(".py") else f"chmod +x {program}"
    print(f"commrun: {program}: not executable, or given without a path; try: {advice}", file=sys.stderr)
    return NOT_EXECUTABLE
