"""Does the plugin fit a vLLM that is not installed? Reads its source only: a wheel, or a folder that holds `vllm/`.

    python tools/check_vllm.py out/wheels/vllm-0.33.0-*.whl

Every name that foem_vllm/plugin/compat.py imports must be there; methods that vLLM calls must take what it passes, and none may
be missing; what the plugin calls must take what the plugin passes; attributes that it reads from layers must exist. Standard
library only. Exit code 1 and a line for everything that does not fit.
"""
from __future__ import annotations

import ast
import functools
import pathlib
import sys
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

PLUGIN = pathlib.Path(__file__).resolve().parents[1] / "foem_vllm/plugin"
CALLS = {  # what the plugin calls: positional arguments, keyword arguments
    "register_quantization_config": (1, ()),
    "get_safetensors_params_metadata": (1, ("revision",)),
    "UnquantizedLinearMethod": (0, ()),
    "UnquantizedEmbeddingMethod": (0, ()),
    "get_current_vllm_config_or_none": (0, ()),
    "UnquantizedFusedMoEMethod": (1, ()),
    "FusedMoEMethodBase": (1, ()),
    "WeightsMapper": (0, ()),
    "WeightsMapper.apply_dict": (1, ()),
}
LAYERS = {  # names under which the plugin's modules hold vLLM's objects: {module: {name: where its attributes are defined}}
    "linear.py": {"layer": ("LinearBase", "ParallelLMHead", "torch")},
    "filled.py": {"layer": ("torch",)},
    "moe.py": {"layer": ("RoutedExperts", "torch"), "config": ("FusedMoEConfig",)},
    "config.py": {"layer": ("RoutedExperts", "torch")},
}
OTHERS = {"FusedMoEConfig": "vllm.model_executor.layers.fused_moe.config"}  # read, not imported
TORCH = {"_parameters", "register_parameter"}


class Function(NamedTuple):
    """Parameters of a function without self or cls. names: in order, positional ones first."""

    names: tuple[str, ...]
    positional: int
    required: frozenset[str]
    args: bool
    kwargs: bool

    @classmethod
    def read(cls, node: ast.FunctionDef) -> Function:
        a = node.args
        places = [p.arg for p in (*a.posonlyargs, *a.args)]
        required = set(places[: len(places) - len(a.defaults)])
        required |= {p.arg for p, default in zip(a.kwonlyargs, a.kw_defaults) if default is None}
        if places and places[0] in ("self", "cls"):
            required.discard(places.pop(0))
        return cls((*places, *(p.arg for p in a.kwonlyargs)), len(places), frozenset(required), bool(a.vararg), bool(a.kwarg))

    def takes(self, positional: int, keywords: tuple[str, ...]) -> bool:
        given = {*self.names[:positional], *keywords}
        return (self.args or positional <= self.positional) and (self.kwargs or set(keywords) <= set(self.names)) \
            and self.required <= given

    def misfit(self, base: Function) -> str | None:
        """Why a method of these parameters cannot stand for `base`; None when every call of `base` is one of it."""
        if missing := [name for name in base.names if name not in self.names and not self.kwargs
                       and not (self.args and name in base.names[: base.positional])]:
            return f"does not take {', '.join(missing)}"
        if more := sorted(self.required - base.required):
            return f"needs {', '.join(more)}" if not base.kwargs and not base.args else None
        here = [name for name in base.names[: base.positional] if name in self.names]
        return "takes its arguments in another order" if here != [n for n in self.names if n in here] else None


class Source:
    """The modules of one vLLM. Raises OSError or KeyError on a place that holds none."""

    def __init__(self, where: pathlib.Path):
        self.archive = zipfile.ZipFile(where) if where.is_file() else None
        self.where = where
        self.text("vllm/__init__.py")

    def text(self, path: str) -> str:
        if self.archive:
            return self.archive.read(path).decode()
        return (self.where / path).read_text("utf-8")

    @functools.cache  # noqa: B019  (lives as long as the program)
    def module(self, name: str) -> ast.Module:
        path = name.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            try:
                return ast.parse(self.text(file))
            except (OSError, KeyError):
                continue
        raise LookupError(f"there is no module {name}")

    def find(self, module: str, name: str) -> tuple[str, ast.AST]:
        """(module that defines `name`, the statement), through re-exports. Raises LookupError."""
        for node in ast.walk(self.module(module)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return module, node
        for node in ast.walk(self.module(module)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vllm"):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(node.module, alias.name)
        raise LookupError(f"{module} has no {name}")

    def methods(self, module: str, name: str) -> dict[str, ast.FunctionDef]:
        """{method: definition} of a class and those it inherits from vLLM's, nearest first."""
        module, node = self.find(module, name)
        found: dict[str, ast.FunctionDef] = {}
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not is_overload(inner):
                    found.setdefault(inner.name, inner)
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id not in ("ABC", "Enum"):
                    found = {**self.methods(module, base.id), **found} if self.known(module, base.id) else found
        return found

    def known(self, module: str, name: str) -> bool:
        try:
            self.find(module, name)
        except LookupError:
            return False
        return True

    def attributes(self, module: str) -> set[str]:
        """Every name that the classes of a module give their objects, and the fields and methods of the classes."""
        found = set()
        for node in ast.walk(self.module(module)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
        return found


def is_overload(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


def is_abstract(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "abstractmethod" for d in node.decorator_list)


def imports_of(compat: ast.Module) -> dict[str, str]:
    """{name: vLLM module} of everything that compat.py imports, now or later."""
    found = {}
    constants = {node.targets[0].id: node.value for node in compat.body if isinstance(node, ast.Assign)}
    for node in compat.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm"):
            found |= {alias.name: node.module for alias in node.names}
    for key, value in zip(constants["_LATER"].keys, constants["_LATER"].values):
        found[key.value] = (constants[value.id] if isinstance(value, ast.Name) else value).value
    return found


def our_classes() -> Iterator[tuple[ast.ClassDef, str]]:
    """(class, name of the vLLM class that it derives from) of the plugin."""
    for path in sorted(PLUGIN.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for base in getattr(node, "bases", ()):
                if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and base.value.id == "compat":
                    yield node, base.attr


def attributes_read(path: pathlib.Path, name: str) -> set[str]:
    """X of every `name.X` that a module reads; what it sets itself is left out."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text("utf-8")))
             if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name]
    stored = {n.attr for n in nodes if isinstance(n.ctx, ast.Store)}
    return {n.attr for n in nodes} - stored


def dataclass_init(node: ast.ClassDef) -> ast.FunctionDef:
    """The constructor that a class without one gets from its fields; of no arguments where it has none."""
    fields = [(n.target.id, n.value is not None) for n in node.body if isinstance(n, ast.AnnAssign)]
    names = ", ".join(f"{name}=None" if default else name for name, default in fields)
    return ast.parse(f"def __init__(self, {names}): ...").body[0]


def method_problems(source: Source, places: dict[str, str]) -> Iterator[str]:
    for node, base in our_classes():
        theirs = source.methods(places[base], base)
        ours = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        yield from (f"{node.name} lacks {name}, which is abstract in {base}" for name, method in theirs.items()
                    if is_abstract(method) and name not in ours)
        for name in ours.keys() & theirs.keys() - {"__init__"}:
            if reason := Function.read(ours[name]).misfit(Function.read(theirs[name])):
                yield f"{node.name}.{name} {reason}, unlike {base}.{name}"


def call_problems(source: Source, places: dict[str, str]) -> Iterator[str]:
    for name, (positional, keywords) in CALLS.items():
        owner, _, method = name.partition(".")
        module, node = source.find(places[owner], owner)
        if isinstance(node, ast.ClassDef):
            node = source.methods(module, owner).get(method or "__init__") or dataclass_init(node)
        if not Function.read(node).takes(positional, keywords):
            yield f"{name} takes other arguments now"


def attribute_problems(source: Source, places: dict[str, str]) -> Iterator[str]:
    for file, names in LAYERS.items():
        for name, owners in names.items():
            known = set().union(*(TORCH if o == "torch" else source.attributes(source.find(places[o], o)[0]) for o in owners))
            if missing := sorted(attributes_read(PLUGIN / file, name) - known):
                yield f"{file} reads {', '.join(missing)} of {name}, which {owners[0]} does not have"


def problems(source: Source) -> list[str]:
    """Everything that does not fit, one line each."""
    places = imports_of(ast.parse((PLUGIN / "compat.py").read_text("utf-8")))
    found = []
    for name, module in places.items():
        try:
            source.find(module, name)
        except LookupError as error:
            found.append(f"compat.py imports {name}: {error.args[0]}")
    if found:
        return found
    places |= OTHERS
    return [*method_problems(source, places), *call_problems(source, places), *attribute_problems(source, places)]


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    failed = False
    for where in map(pathlib.Path, arguments):
        try:
            found = problems(Source(where))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            found = [f"no vLLM there ({error}); give a wheel, or a folder that holds vllm/"]
        print("\n".join(f"{where.name}: {line}" for line in found or ["fits"]))
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
