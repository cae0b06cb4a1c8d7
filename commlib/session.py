"""From nothing to a communicator, and the default one behind the module-level functions.

`open_communicator` is the order of events at init: who am I, meet, agree, link, measure. `Session` holds the default
communicator of a process, of which there is one; it is the only state that this package keeps by itself.
"""

import atexit
import contextlib
import errno
import functools
import inspect
import logging
import os
from dataclasses import fields, replace

from commlib import bootstrap, mpi, mpi_mover, rendezvous, stalls
from commlib.calibrate import calibrated
from commlib.communicator import Communicator
from commlib.connect import connect
from commlib.control import Control
from commlib.engine import Engine
from commlib.errors import CommlibError, MismatchError
from commlib.interfaces import parse_ports
from commlib.secret import Secret
from commlib.settings import Settings
from commlib.version import VERSION

_log = logging.getLogger("commlib")

_SETTING_NAMES = frozenset(field.name for field in fields(Settings))
# Options that are no settings: they may differ between ranks, or are another file's.
_OTHER_OPTIONS = frozenset(("settings", "timeline", "start_timeout_s", "network_interfaces", "port_range",
                            "allow_unauthenticated", "log_level", "backend"))


def _native(engine, topology, settings, placement, timeout_s):
    return Communicator(engine, topology, settings)


def open_communicator(generation, settings=None, timeout_s=None, environ=None, backend=None, backends=None, secret=None,
                      comm=None, network=None, meeting=None):  # fmt: skip
    """Meets the other ranks and links them.

    Args:
        generation: how many times this process has done so, this time included.
        settings: a Settings record; None: the file named by COMMLIB_SETTINGS, or the defaults. COMMLIB_* options of the
            environment override single fields.
        timeout_s: how long to wait for the other ranks; None: COMMLIB_START_TIMEOUT_S or 60 s.
        environ: the environment to read; None: the process's own.
        backend: the name of who moves the bytes; None: COMMLIB_BACKEND or "native".
        backends: what there is beside the engine: name -> function(engine, topology, settings, placement, timeout_s) that
            makes the Communicator.
        secret: where ranks of several hosts find the job's secret if the launcher gave them none: function(placement) -> text.
        comm: the MPI communicator whose ranks these are, as for `commlib.mpi.communicator_of`; None: the launcher's, unless
            the transport is "mpi".
        network: this rank's "network_interfaces" and "port_range" where they are not the environment's, as for
            `commlib.init`; None stands for the environment's.
        meeting: a store that the ranks have already, as a context manager like rendezvous.Store; it says rank and size.

    Raises:
        StartError: a rank did not come, was lost, or cannot be reached.
        MismatchError: ranks differ in their settings.
        ValueError: an option that is no setting or cannot have its value; an unknown backend.
    """
    options = bootstrap.options(environ)
    _set_log_level(options.get("log_level"))
    settings = _starting_settings(settings, options)
    if meeting is not None:
        placement = bootstrap.placed(meeting.rank, meeting.size, meeting.owner, environ)
    elif comm is not None or settings.transport == "mpi":
        comm = mpi.communicator_of(comm)
        placement = bootstrap.placed(comm.rank, comm.size, "MPI", environ)
    else:
        placement = _with_secret(bootstrap.discover(environ), secret)
    placement = _on_network(placement, **(network or {}))
    backend = backend or placement.options.get("backend", "native")
    native = functools.partial(mpi_mover.mpi_communicator, comm) if comm and mpi_mover.is_chosen(settings) else _native
    make_communicator = _maker(backend, {**(backends or {}), "native": native})
    engine = Engine(placement.rank, placement.size, settings)
    try:
        store = meeting or _meet(placement, generation, timeout_s, comm)
        topology = _link(engine, placement, settings, backend, store, comm)
        communicator = make_communicator(engine, topology, settings, placement, timeout_s)
        record = calibrated(settings, engine, topology.hosts).to_json().encode()
        record = communicator.control.broadcast_bytes(record, name="settings", timeout_s=timeout_s)
    except BaseException:
        engine.shutdown(0)
        raise
    communicator.settings = Settings.from_json(record.decode())
    _log.debug("rank %d of %d: settings %08x %s", engine.rank, engine.size, communicator.settings.hash, record.decode())
    if communicator.size > 1 and settings.stall_warning_s > 0:
        stalls.watch(engine)
    if "timeline" in placement.options:
        communicator.start_timeline(placement.options["timeline"])
    return communicator


def _with_secret(placement, source):
    """The placement with a secret out of `source`, if it has none and the ranks meet over a network."""
    if source is None or placement.secret or placement.size == 1 or rendezvous.is_local(placement.store):
        return placement
    return replace(placement, secret=Secret(source(placement)))


def _on_network(placement, network_interfaces=None, port_range=None):
    """The placement with its own choice of interfaces and ports, in the words of the options."""
    chosen = {}
    if network_interfaces is not None:
        is_text = isinstance(network_interfaces, str)
        chosen["network_interfaces"] = network_interfaces if is_text else ",".join(network_interfaces)
    if port_range is not None:
        chosen["port_range"] = port_range if isinstance(port_range, str) else "{}-{}".format(*port_range)
        parse_ports(chosen["port_range"])
    return replace(placement, options={**placement.options, **chosen})


def _set_log_level(text):
    """COMMLIB_LOG_LEVEL, in Horovod's words or logging's. A program that configures no logging sees the lines on stderr."""
    if text is None:
        return
    levels = {"TRACE": logging.DEBUG, "FATAL": logging.CRITICAL}
    level = levels.get(text.upper(), logging.getLevelName(text.upper()))
    if not isinstance(level, int):
        raise ValueError(f"COMMLIB_LOG_LEVEL is {text!r}: it must be TRACE, DEBUG, INFO, WARNING, ERROR or FATAL")
    _log.setLevel(level)
    if not _log.hasHandlers():
        _log.addHandler(logging.StreamHandler())


def _maker(backend, makers):
    if backend not in makers:
        raise ValueError(
            f"there is no backend {backend!r} here, only {', '.join(sorted(makers))}: give init(backend=...) or "
            'COMMLIB_BACKEND another name; for "gloo", call commlib.torch.init() and not commlib.init()'
        )
    return makers[backend]


def _starting_settings(settings, options):
    """The record before anything was measured: given, from a file, or default; with the environment's overrides."""
    if settings is None:
        settings = Settings.load(options["settings"]) if "settings" in options else Settings()
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be a commlib.Settings, not {type(settings).__name__}")
    for name in sorted(set(options) - _SETTING_NAMES - _OTHER_OPTIONS):
        _log.warning("COMMLIB_%s is no option of commlib and has no effect", name.upper())
    return settings.overridden({name: text for name, text in options.items() if name in _SETTING_NAMES})


def _meet(placement, generation, timeout_s, comm):
    """Where the ranks meet: in a store that one of them or the launcher serves, or in MPI."""
    if comm is None:
        return rendezvous.join(placement, generation, VERSION, timeout_s)
    return mpi.Meeting(comm, placement.start_timeout_s if timeout_s is None else timeout_s)


def _link(engine, placement, settings, backend, store, comm):
    """Agrees with the other ranks in the store, links the engine and starts it."""
    with _advice(placement.rank), store:
        control = Control(functools.partial(_exchange_in_store, store), placement.rank, placement.size)
        mismatch = _mismatch(control, {**settings.as_dict(), "backend": backend, "version": VERSION})
        if mismatch is None:
            library = None if comm is None else store.library(engine)
            topology = connect(placement, store, engine, settings.transport, library)
            if len(set(topology.hosts)) > 1:
                engine.name_hosts(topology.names)
            engine.start()
    # Outside the store: every rank has seen the same and raises for itself, so none need abort the others.
    if mismatch is not None:
        raise mismatch
    return topology


# What a process may be short of while it opens sockets and memory, and what to do about it.
_SHORTAGES = {
    errno.EMFILE: "raise the limit of open files of a process (ulimit -n): a rank needs about four for every other rank",
    errno.ENFILE: "raise the system's limit of open files (sysctl fs.file-max)",
    errno.ENOMEM: "free some memory, or set a smaller COMMLIB_SHM_RING_NBYTES",
    errno.ENOBUFS: "free some memory, or start fewer ranks on this host",
}


@contextlib.contextmanager
def _advice(rank):
    try:
        yield
    except OSError as error:
        if error.errno not in _SHORTAGES:
            raise
        raise bootstrap.StartError(f"rank {rank} cannot start: {error.strerror}: {_SHORTAGES[error.errno]}", rank) from error
    except CommlibError as error:  # the engine was short of something, and says of what
        if type(error) is not CommlibError:
            raise
        raise bootstrap.StartError(f"rank {rank} cannot start: {error}", rank) from error


def _exchange_in_store(store, payload, *, name, timeout_s=None):
    return store.gather(name, payload, timeout_s)


def _mismatch(control, record):
    try:
        control.agree("settings", record,
                      advice="give every rank the same COMMLIB_* variables and the same init(settings=...)")  # fmt: skip
    except MismatchError as error:
        return error
    return None


class Session:
    """The default communicator of a process, and how often there was one."""

    def __init__(self):
        self._communicator = None
        self._generation = 0
        atexit.register(self.shutdown)
        os.register_at_fork(after_in_child=self._after_fork)

    def init(self, *args):
        """Makes the default communicator; while there is one, returns it. Arguments as of `open_communicator`."""
        if self._communicator is None:
            self._generation += 1
            self._communicator = open_communicator(self._generation, *args)
        elif self._communicator.is_forked:
            raise self._communicator.health
        return self._communicator

    def shutdown(self):
        """Closes the default communicator, if there is one."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.close()

    def communicator(self):
        """The default communicator.

        Raises:
            ValueError: there is none.
        """
        if self._communicator is None:
            raise ValueError("commlib is not initialized: call commlib.init() first")
        return self._communicator

    @property
    def is_initialized(self):
        """True between init and shutdown."""
        return self._communicator is not None

    def _after_fork(self):
        if self._communicator is not None:
            self._communicator.after_fork()


def forwarded(method, session):
    """A Communicator's method as a function on the session's default communicator, with its own signature and text."""

    @functools.wraps(method)
    def function(*args, **kwargs):
        return method(session.communicator(), *args, **kwargs)

    signature = inspect.signature(method)
    function.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    return function
