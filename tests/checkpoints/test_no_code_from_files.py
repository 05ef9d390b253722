"""No module can be made to run code by what it reads: nothing unpickles, evaluates, or loads YAML with its objects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "elmo_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
READS_PICKLES = PACKAGE / "checkpoints" / "elmo_many_langs.py"
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "runpy", "code", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "numpy.lib.format"}
CALLS |= {f"yaml.{name}" for name in ("unsafe_load", "full_load", "load_all", "unsafe_load_all", "full_load_all")}
CALLS |= {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader", "os.system", "os.popen"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression, or an empty text; `np` and `dist` are as they are always imported here."""
    if isinstance(node, ast.Name):
        return {"np": "numpy", "dist": "torch.distributed"}.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".removeprefix(".")
    return ""


def offences(source: str) -> list[str]:
    """Line and name of everything that could run what a file or another rank says."""
    tree = ast.parse(source)
    safe = SAFE_LOADERS | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and {dotted(base) for base in node.bases} <= {"yaml.SafeLoader"}
        and node.bases
    }
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in full if name.split(".")[0] in MODULES or name in CALLS | {"yaml.load"}]
            names += [name for name in full if name.startswith("torch.distributed") and "_object" in name]
        elif isinstance(node, ast.Name | ast.Attribute):
            name = dotted(node)
            bad = name in CALLS or ("_object" in name and name.startswith("torch.distributed."))
            names = [name] if bad else []
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            name = dotted(node.func)
            if name == "yaml.load":
                loader = keywords.get("Loader", node.args[1] if len(node.args) > 1 else ast.Constant(None))
                names = [] if dotted(loader).rsplit(".", 1)[-1] in safe else [name]
            allows = keywords.get("allow_pickle")
            if allows is not None and not (isinstance(allows, ast.Constant) and allows.value is False):
                names.append(f"{name} allow_pickle")
        found.extend((getattr(node, "lineno", 0), name) for name in names)
    return [f"line {line}: {name}" for line, name in sorted(found)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_runs_nothing_that_it_reads(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    found = [offence.split(": ")[1] for offence in offences(source)]
    if path == READS_PICKLES:
        # the one exception: models of others that are pickles, read without anything but tensors
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        (load,) = (call for call in calls if dotted(call.func) == "torch.load")
        keywords = {keyword.arg: keyword.value for keyword in load.keywords}
        assert ast.unparse(keywords["weights_only"]) == "True"
        found.remove("torch.load")
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "x = eval('1')", "exec(text)",
        "f = eval", "torch.load(path, weights_only=True)", "from torch import load", "yaml.load(text)",
        "from yaml import load",
        "yaml.load(text, Loader=yaml.Loader)", "yaml.load(text, yaml.FullLoader)", "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "np.savez(path, allow_pickle=1)",
        "dist.all_gather_object(box, value)", "torch.distributed.broadcast_object_list(box)",
        "from torch.distributed import scatter_object_list", "os.system(text)",
        "class L(yaml.Loader): pass\nyaml.load(text, Loader=L)",
    ],
)  # fmt: skip
def test_it_would_be_found(line: str) -> None:
    assert offences(line)


def test_what_is_allowed() -> None:
    assert not offences("class L(yaml.SafeLoader): pass\nyaml.load(text, Loader=L)\nyaml.safe_load(text)")
    assert not offences("np.load(path, allow_pickle=False)\nmodel.eval()\njson.loads(text)\nre.compile('x')")
