"""The commlib command: one line of a table per subcommand.

A subcommand is a module with `add_arguments(parser)` and `run(options)`, which returns the exit code.
"""

import argparse
import sys

from commlib import simulate, tune
from commlib.version import VERSION

# name -> (module, what it does)
COMMANDS = {
    "simulate": (simulate, "predict how fast a model trains on a cluster that is described in a file"),
    "tune": (tune, "measure links and algorithms, and write the settings record that suits this machine"),
}


def main(arguments=None):
    """Runs commlib; returns its exit code.

    Args:
        arguments: the command line without the program name; None: the process's own.
    """
    parser = argparse.ArgumentParser("commlib", description="Tools of commlib. Those that measure are started on several "
                                     "ranks, with commrun.")  # fmt: skip
    parser.add_argument("--version", action="version", version=f"commlib {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=module.__doc__,
                                                 formatter_class=argparse.RawDescriptionHelpFormatter))  # fmt: skip
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    return COMMANDS[options.command][0].run(options)
