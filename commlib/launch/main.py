"""The commrun command: options in, exit code out."""
from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import List, Optional

from commlib.launch import build, environment
from commlib.launch.caller import Caller
from commlib.launch.check import Check
from commlib.launch.cluster import Cluster
from commlib.launch.job import Job
from commlib.launch.options import parse
from commlib.launch.output import say
from commlib.launch.processes import unusable
from commlib.settings import Settings

WRONG_OPTION = 2


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs commrun; returns its exit code: 0, the first failed rank's code, or 128 + signal.

    Args:
        arguments: the command line without the program name; None: the process's own.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    environ = {**os.environ, **environment.of_options(options)}
    if options.check_build:
        return build.report()
    if options.check:
        return Check(options, list(options.slots or {socket.gethostname(): 1}), environ).run()
    caller = None if options.call is None else Caller(options.call)
    mistake = _mistake(options)
    if mistake is not None:
        say(mistake)
        if caller is not None:
            caller.failed(mistake)
        return WRONG_OPTION
    if options.places is not None:
        return Cluster(options, options.places, environ, caller).run()
    unusable_program = unusable(options.command[0], environ.get("PATH"))
    if unusable_program is not None:
        code, text = unusable_program
        say(text)
        return code
    return Job(options, {**environ, **environment.given(os.environ, options.variables)}, caller).run()


def _mistake(options: argparse.Namespace) -> Optional[str]:
    """What is wrong with the files that the options name, and what to do; None: nothing. Makes the output folder."""
    try:
        if options.output_filename is not None:
            os.makedirs(options.output_filename, exist_ok=True)
    except OSError as error:
        return f"--output-filename {options.output_filename}: {error.strerror}; name a folder that can be written"
    if options.ssh_identity_file is not None and not os.access(options.ssh_identity_file, os.R_OK):
        return f"-i {options.ssh_identity_file}: it cannot be read; name your private key for the hosts"
    try:
        if options.settings is not None:
            Settings.load(options.settings)
    except (OSError, ValueError) as error:
        return f"--settings {options.settings}: {error}; name a file that `commlib tune` or Settings.save wrote"
    return None
