"""The rules of the house that matter, as tests: which way imports point, who may touch what, how long files are."""

import ast
import importlib
import inspect
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORE = ROOT / "commlib"

# Lower layers first. A module may import modules of lower layers, and of its own layer unless it is said to be closed.
LAYERS = [
    {"_native", "version"},
    {"errors", "buffer", "names", "reduction", "settings", "timeline", "plan", "cost", "verify", "fit", "schedule", "models",
     "messages", "json_table", "cluster", "secret", "compressor", "requests"},
    {"algorithms"},
    {"bootstrap", "rendezvous", "rendezvous_wire", "rendezvous_server", "rendezvous_room", "proof", "handshake", "connect",
     "interfaces", "dial", "told", "mpi"},
    {"engine", "memory", "control", "selection"},
    {"calibrate", "layout", "handle", "prepared", "results", "simulation", "stalls", "joining", "standing_in"},
    {"collective", "simulated_training"},
    {"tickets", "workload", "traced", "grouped", "membership", "adasum"},
    {"communicator"},
    {"mpi_mover", "direct"},
    {"session"},
    {"__init__", "run", "launch"},
    {"tune", "tune_report", "simulate", "simulate_report"},
    {"commands", "horovod", "process_sets", "built", "ops"},
    {"__main__"},
]
TOUCH_NATIVE = {"engine", "requests", "memory", "simulation", "calibrate", "errors"}
READ_ENVIRONMENT = {"bootstrap"}
HAND_ENVIRONMENT_ON = {"launch", "run"}
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "mpi4py"}

MOST_LINES = {".py": 450, ".c": 650, ".cc": 650, ".h": 650}
LONGEST_LINE = 132  # the house writes 120; this is where it stops being a matter of taste


def layer_of(module):
    for number, modules in enumerate(LAYERS):
        if module in modules:
            return number
    return None


def python_files():
    return sorted(path for path in CORE.rglob("*.py"))


def top_module(path):
    parts = path.relative_to(CORE).with_suffix("").parts
    return parts[0]


def imports_of(path):
    """(module of commlib or top-level package, line) of every import of a file."""
    package = ("commlib", *path.relative_to(CORE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield [*base, alias.name], node.lineno


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(CORE)))
def test_imports_point_down(path):
    mine = top_module(path)
    assert layer_of(mine) is not None, f"{mine} is in no layer: give it one in {__file__}"
    for parts, line in imports_of(path):
        where = f"{path.name}:{line}"
        assert parts[0] not in FRAMEWORKS, f"{where}: the core imports the framework {parts[0]}"
        if parts[0] != "commlib" or len(parts) < 2:
            continue
        theirs = parts[1]
        if theirs == "_native":
            assert mine in TOUCH_NATIVE, f"{where}: only {', '.join(sorted(TOUCH_NATIVE))} import commlib._native"
        elif layer_of(theirs) is not None and theirs != mine:
            assert layer_of(theirs) <= layer_of(mine), f"{where}: {mine} lies below {theirs}"


def test_no_import_cycles():
    edges = {}
    for path in python_files():
        targets = {parts[1] for parts, _ in imports_of(path) if parts[0] == "commlib" and len(parts) > 1}
        edges.setdefault(top_module(path), set()).update(targets)
    finished, active = set(), []

    def visit(module):
        assert module not in active, f"import cycle: {' -> '.join([*active, module])}"
        if module in finished or module not in edges:
            return
        active.append(module)
        for target in edges[module] - {module}:
            visit(target)
        finished.add(active.pop())

    for module in list(edges):
        visit(module)


def test_only_bootstrap_reads_the_environment():
    for path in python_files():
        if top_module(path) in READ_ENVIRONMENT | HAND_ENVIRONMENT_ON:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else None
            assert name not in ("environ", "getenv"), f"{path.name}:{node.lineno} reads the environment"


def sources():
    folders = ["commlib", "native", "frameworks", "tests", "examples", "benchmarks"]
    files = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in files if path.suffix in MOST_LINES and "_native" not in path.name
                  and "build" not in path.relative_to(ROOT).parts)  # fmt: skip


def test_files_are_short():
    faults = []
    for path in sources():
        name, lines = path.relative_to(ROOT), path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MOST_LINES[path.suffix]:
            faults.append(f"{name} has {len(lines)} lines, more than {MOST_LINES[path.suffix]}: split it")
        faults += [f"{name}:{number} has {len(line)} characters" for number, line in enumerate(lines, 1)
                   if len(line) > LONGEST_LINE]  # fmt: skip
    assert not faults, "\n".join(faults)


def test_files_say_what_they_are():
    """Every file opens with a few lines that say what it knows; before them only a feature test macro may stand."""
    faults = []
    for path in sources():
        text = path.read_text(encoding="utf-8").removeprefix("#define _GNU_SOURCE").lstrip()
        if text and not text.startswith(('"""',) if path.suffix == ".py" else ("/*", "//")):
            faults.append(str(path.relative_to(ROOT)))
    assert not faults, "these do not open with a few lines that say what they know: " + ", ".join(faults)


# Public modules whose types stand in a page of their own (.pyi), beside them.
TYPED = {"commlib": CORE, "commlib.process_sets": CORE, "commlib.torch": ROOT / "frameworks/torch",
         "commlib.torch.distributed": ROOT / "frameworks/torch/distributed"}  # fmt: skip


def _names_in(body):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield node.targets[0].id
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname for alias in node.names if alias.asname)


def _arguments_of_stub(function):
    """[(name, whether it has a default)] as the page says it."""
    arguments = function.args
    defaults = [False] * (len(arguments.args) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    named = [(argument.arg, has) for argument, has in zip(arguments.args, defaults)]
    return named + [(argument.arg, default is not None) for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults)]


def _arguments_of(function):
    """The same of the code."""
    parameters = inspect.signature(function).parameters.values()
    return [(one.name, one.default is not one.empty) for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]


def _functions(body, owner):
    """(what the page says, what the code has) of every function and method."""
    for node in body:
        if isinstance(node, ast.ClassDef) and hasattr(owner, node.name) and node.name != "Settings":
            yield from _functions(node.body, getattr(owner, node.name))
        elif isinstance(node, ast.FunctionDef) and not node.decorator_list:
            yield node, getattr(owner, node.name)


@pytest.mark.parametrize("name", TYPED)
def test_types_are_those_of_the_code(name):
    """Whoever adds a public name or an argument adds its type."""
    check_types(name, TYPED[name] / "process_sets.pyi" if name.endswith("process_sets") else TYPED[name] / "__init__.pyi")


def check_types(name, page):
    """Compares a module and its page."""
    module, body = importlib.import_module(name), ast.parse(page.read_text(encoding="utf-8")).body
    page = page.relative_to(ROOT)
    missing = set(getattr(module, "__all__", ())) - set(_names_in(body))
    assert not missing, f"{page} lacks the types of {', '.join(sorted(missing))}: add them there"
    for node, function in _functions(body, module):
        wanted = [pair for pair in _arguments_of(function) if pair[0] != "self"]
        said = [pair for pair in _arguments_of_stub(node) if pair[0] != "self"]
        assert said == wanted, f"{page}:{node.lineno}: {node.name} has other arguments in the code: {wanted}"
