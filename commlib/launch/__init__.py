"""commrun: starts the ranks of a job on this host or on several, lets them meet, and stops all of them when one fails.

main.py reads options.py and runs a job.py (this host) or a
cluster.py (several hosts, by hostlinks.py and link.py, with a host.py on each); ranks.py is what both do with processes.
check.py asks hosts' survey.py before a job. caller.py and task.py are two ends of `commlib.run` (run.py of the package above).
child.py and guard.py are small programs of their own that run beside commrun.
"""

from commlib.launch.main import main

__all__ = ["main"]
