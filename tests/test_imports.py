"""How the code is laid out: imports run downward only, nothing from a message is ever executed, files fit a sitting."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1] / "src"

# From the ground up. A module imports from its own floor and from those below, never from above.
FLOORS = {
    "ground": ("schema", "trees", "spec", "wire", "compress", "secret", "plugins", "heap"),
    "a hospital's side": ("step", "site"),
    "what is learned, and from what": ("models", "tasks", "data"),
    "the conversation": ("method", "parts", "averaging"),
    "the methods and the study": ("methods", "study", "respond"),
    "the record": ("memory", "ledger", "chain", "journal", "recorded", "trust", "statistics"),
    "engines": ("engines",),
    "the loop": ("run",),
    "what is shown": ("report", "live"),
    "studies carried out": ("studyfile", "disk", "launch", "predict", "compare", "demo"),
    "between hospitals": ("consortium",),
    "commands": ("cli", "__main__"),
}
HEIGHT = {room: height for height, rooms in enumerate(FLOORS.values()) for room in rooms}
# To models, tasks and data:
BLIND = {"method", "parts", "averaging", "methods", "study", "respond", "recorded", "engines", "run"}

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "code",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load",
                   "torch.hub.load", "importlib.import_module", "runpy.run_path", "runpy.run_module", "os.system",
                   "os.popen", "pandas.read_pickle", "torch.package.PackageImporter"}  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
FILES = sorted(ROOT.rglob("*.py"))


def room(module: str) -> str:
    """The module or package below ``fedscan`` that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """All that a file imports, at its head or inside a function, as full names of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written out from fedscan on"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def edges() -> dict[str, set[str]]:
    return {
        module: {other for other in imported(tree) if other in MODULES and other not in ("fedscan", module)}
        for module, tree in MODULES.items()
    }


def test_every_module_stands_on_a_floor() -> None:
    assert {room(m) for m in MODULES} - {""} <= set(HEIGHT)


def test_imports_run_downward() -> None:
    wrong = [
        f"{module} imports {other}, which stands above it"
        for module, others in edges().items()
        for other in others
        if module != "fedscan" and HEIGHT[room(other)] > HEIGHT[room(module)]
    ]
    assert not wrong


def test_models_tasks_and_data_know_nothing_of_federation() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in edges().items()
        for other in others
        if room(module) in ("models", "tasks", "data") and room(other) in BLIND
    ]
    assert not wrong


def test_no_module_imports_itself_over_others() -> None:
    TopologicalSorter(edges()).prepare()


def test_no_package_imports_itself_over_others() -> None:
    graph: dict[str, set[str]] = {}
    for module, others in edges().items():
        graph.setdefault(room(module), set()).update({room(other) for other in others} - {room(module)})
    TopologicalSorter(graph).prepare()


def test_a_circle_would_be_seen() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({**edges(), "fedscan.wire": {"fedscan.run"}}).prepare()
    planted = ast.parse(
        "def f():\n    from fedscan.engines import local\n    import pickle, torch\n    torch.load('x')"
    )
    assert set(imported(planted)) >= {"fedscan.engines.local", "pickle"}
    assert called(planted) == {"torch.load"}
    assert called(ast.parse("model.eval(); re.compile('x'); eval('1')")) == {"model.eval", "re.compile", "eval"}


def called(tree: ast.AST) -> set[str]:
    """The dotted names of all that is called."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled_or_executed(module: str) -> None:
    tree = MODULES[module]
    assert not {name.split(".")[0] for name in imported(tree)} & FORBIDDEN_MODULES
    assert not called(tree) & FORBIDDEN_CALLS
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell", "weights_only"):
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is (node.arg == "weights_only")
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            assert not names & FORBIDDEN_CALLS


def test_files_fit_a_sitting_and_functions_a_screen() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > 500} == {}
    assert median(lines.values()) < 150
    long = {
        f"{module}.{node.name}": length
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > 80
    }
    assert long == {}


def test_every_module_and_public_function_says_what_it_does() -> None:
    """Classes and functions at the top of a module; methods of a protocol or a dataclass may speak for themselves."""
    silent = [module for module, tree in MODULES.items() if not ast.get_docstring(tree)]
    silent += [
        f"{module}.{node.name}"
        for module, tree in MODULES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert len(silent) <= 1, silent


HEAVY = (
    "torch",
    "numpy",
    "monai",
    "matplotlib",
    "scipy",
    "nibabel",
    "pydantic",
    "rich",
    "typer",
    "jinja2",
    "zstandard",
    "cryptography",
)


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that are there after a statement, in a new process."""
    code = f"import sys\n{statement}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split()) & set(HEAVY)


def test_importing_fedscan_costs_nothing() -> None:
    assert loaded_by("import fedscan; fedscan.__version__") == set()


def test_the_ground_needs_torch_and_no_more() -> None:
    """What every run imports brings no plotting, no medical formats, no terminal."""
    assert loaded_by("import fedscan.run, fedscan.averaging") <= {"torch", "numpy", "zstandard"}
