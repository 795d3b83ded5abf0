"""No file that the project reads can run code: its source has none of the readers that would let it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(
    path.relative_to(ROOT)
    for pattern in ("clmfast/**/*.py", "benchmarks/**/*.py", "csrc/**/*.py", "setup.py")
    for path in ROOT.glob(pattern)
)
MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "yaml",
    "ruamel", "runpy", "code", "codeop", "dbm",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__", "input"}
# The last names of what is called, after the module that they are called from, where the name alone says too little.
CALLS = {
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle",
    "pd.read_pickle", "np.fromregex", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv",
    "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "zipfile.extractall",
}  # fmt: skip
METHODS = {"extractall", "read_pickle", "unsafe_load"}
# (file, what) -> why it may stand there
BY_NAME = "import_module of what is no constant"
ALLOWED = {
    ("benchmarks/gpu_check.py", BY_NAME): "the sections are a list in the source",
    (
        "benchmarks/worker.py",
        BY_NAME,
    ): "the contenders are a list in the source; their names come from the parent process",
}


def dotted(node: ast.expr) -> str:
    """'torch.jit.load' of such an expression; empty for any other."""
    if isinstance(node, ast.Name):
        return node.id
    outer = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{outer}.{node.attr}" if isinstance(node, ast.Attribute) and outer else ""


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield node.lineno, node.module or ""
            yield from (
                (node.lineno, f"{node.module}.{a.name}") for a in node.names if f"{node.module}.{a.name}" in CALLS
            )
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BUILTINS or name in CALLS:
                yield node.lineno, name
            elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield node.lineno, node.func.attr
            elif name.endswith("import_module") and not (node.args and isinstance(node.args[0], ast.Constant)):
                yield node.lineno, BY_NAME
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and not is_constant(keyword.value, False):
                    yield node.lineno, f"{keyword.arg}=..."
                if keyword.arg == "weights_only":
                    yield node.lineno, "weights_only: torch's own files are pickles"
            is_numpy = name.endswith(("format.read_array", "format.write_array"))
            if is_numpy and not any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield node.lineno, f"{name} without allow_pickle=False"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_reader_can_run_code(path):
    found = faults(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    assert [(line, what) for line, what in found if (str(path), what) not in ALLOWED] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from marshal import loads", "import yaml.reader", "eval(x)", "exec(x)",
        "compile(x, '', 'exec')",
        "torch.load(p)", "from torch import load", "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=given)",
        "os.system(c)", "subprocess.run(c, shell=True)", "importlib.import_module(name)", "file.extractall(p)",
        "np.lib.format.read_array(f)", "__import__(name)", "pandas.read_pickle(p)",
    ],
)  # fmt: skip
def test_what_is_forbidden_is_found(text):
    assert list(faults(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["re.compile(x)", "torch.compile(f)", "np.load(p, allow_pickle=False)", "model.eval()"]
)
def test_what_is_harmless_is_not(text):
    assert not list(faults(ast.parse(text)))


def test_every_source_is_looked_at():
    assert len(SOURCES) > 80 and Path("setup.py") in SOURCES
