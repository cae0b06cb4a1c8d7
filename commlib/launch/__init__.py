"""commrun: starts the ranks of a job on this host, lets them meet, and stops all of them when one fails.

`main` is the console script. options.py reads the command line, job.py runs a job, processes.py starts, reaps and
kills, output.py labels what ranks print; child.py and guard.py are small programs of their own that run beside commrun.
"""

from commlib.launch.main import main

__all__ = ["main"]
