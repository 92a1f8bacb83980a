"""Python packages as sources: what a dotted name means, without importing anything of the package.

A GPU wheel can't be imported where there is no GPU, but its Python files can be read. Names are followed through
imports, both branches of an `if` count, and what lies outside of the given packages is imported only where it is a base
class.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.contract.sources import (
    Class,
    Function,
    Module,
    Outside,
    Real,
    Symbol,
    Unknown,
    Value,
    annotated_names,
    builtin,
    class_of,
    last_name,
    member_of,
    parameters,
    really_imported,
    source,
    submodule,
)

OURS = ("actors", "benchmarks", "jobs", "orchestrator", "tests")
_FIELDS_BY = {"dataclass", "dataclass_transform", "define"}
_FIELD_BASES = {"TypedDict", "NamedTuple", "Struct", "BaseModel"}


class World:
    """Args:
    folders: the packages, by name: the folder that contains the package.
    installed: packages whose compiled modules may be imported.
    """

    def __init__(self, folders: Mapping[str, Path], *, installed: Iterable[str] = ()) -> None:
        self._folders, self._installed = folders, frozenset(installed)
        self._open: set[tuple[Module, str]] = set()
        self.module = cache(self._module)
        self.mro = cache(self._mro)

    def _module(self, name: str) -> Module | Real | Outside | Unknown | None:
        top = name.partition(".")[0]
        folder = self._folders.get(top)
        if folder is None:
            return Outside(name)
        path = folder.joinpath(*name.split("."))
        for file, is_package in ((path / "__init__.py", True), (path.with_suffix(".py"), False)):
            if file.is_file():
                return Module(name, ast.parse(file.read_text(encoding="utf-8")), is_package)
        if any(path.parent.glob(f"{path.name}.*so")):
            return really_imported(name) if top in self._installed else Unknown(name)
        return Module(name, ast.parse(""), True) if path.is_dir() else None

    def find(self, dotted: str) -> Symbol | None:
        """The meaning of an absolute name. None: there is no such thing."""
        names = dotted.split(".")
        symbol: Symbol | None = self.module(names[0])
        for name in names[1:]:
            if symbol is None:
                return None
            symbol = self.member(symbol, name)
        return symbol

    def member(self, symbol: Symbol, name: str) -> Symbol | None:
        """An attribute of a module or class."""
        match symbol:
            case Module():
                return self._of_module(symbol, name)
            case Class():
                return self.attribute(symbol, name)
            case Real(value):
                return Real(getattr(value, name)) if hasattr(value, name) else submodule(value, name)
            case Outside(dotted):
                return Outside(f"{dotted}.{name}")
        return Unknown(name)

    def _of_module(self, module: Module, name: str) -> Symbol | None:
        if (module, name) in self._open:  # a package that imports a module of its own by the same name
            return self.module(f"{module.name}.{name}") if module.is_package else None
        self._open.add((module, name))
        try:
            return self._in_module(module, name)
        finally:
            self._open.discard((module, name))

    def _in_module(self, module: Module, name: str) -> Symbol | None:
        if name in ("__name__", "__file__", "__path__", "__doc__"):
            return Unknown(name)
        for statement in reversed(module.bindings.get(name, [])):
            found = self._bound_to(module, statement, name)
            if found is not None:
                return found
        if module.is_package and (found := self.module(f"{module.name}.{name}")) is not None:
            return found
        for statement in module.bindings.get("*", []):
            found = self._star(module, statement, name)
            if found is not None:
                return found
        if "__getattr__" in module.bindings and any(
            isinstance(node, ast.Constant) and node.value == name for node in ast.walk(module.tree)
        ):
            return Unknown(f"{module.name}.{name}")
        return None

    def _bound_to(self, module: Module, statement: ast.stmt, name: str) -> Symbol | None:
        match statement:
            case ast.ClassDef():
                return class_of(statement, module)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                return Function(statement, module)
            case ast.Import(names):
                for alias in names:
                    if (alias.asname or alias.name.partition(".")[0]) == name:
                        return self.find(alias.name if alias.asname else name)
            case ast.ImportFrom(_, names):
                for alias in names:
                    if (alias.asname or alias.name) == name:
                        return self.imported(source(module, statement), alias.name)
        return Value(statement, module)

    def imported(self, source: str, name: str) -> Symbol | None:
        """What `from source import name` binds."""
        found = self.module(source)
        return None if found is None else self.member(found, name)

    def _star(self, module: Module, statement: ast.stmt, name: str) -> Symbol | None:
        assert isinstance(statement, ast.ImportFrom)
        return self.imported(source(module, statement), name)

    def look_up(self, module: Module, expression: ast.expr) -> Symbol | None:
        """The meaning of a dotted name in a module's scope. None: it has no meaning there."""
        match expression:
            case ast.Name(name):
                found = self._of_module(module, name)
                return found if found is not None else builtin(name)
            case ast.Attribute(value, name):
                inner = self.look_up(module, value)
                return None if inner is None else self.member(inner, name)
            case ast.Subscript(value, _):
                return self.look_up(module, value)
        return Unknown(ast.unparse(expression))

    def _mro(self, cls: Class) -> tuple[Class | Outside | Unknown, ...]:
        """The class and its bases, depth first; a base that comes again counts where it comes last."""
        line: list[Class | Outside | Unknown] = [cls]
        for expression in cls.node.bases:
            base = self.look_up(cls.module, expression)
            match base:
                case Class():
                    line.extend(self.mro(base))
                case Outside() if base.value is not None:
                    line.append(base)
                case _:
                    line.append(Unknown(ast.unparse(expression)))
        return tuple(item for place, item in enumerate(line) if item not in line[place + 1 :])

    def attribute(self, cls: Class, name: str) -> Symbol | None:
        """What instances of the class have under this name. None: nothing, as far as all bases are known."""
        unknown: Unknown | None = None
        for owner in self.mro(cls):
            match owner:
                case Class():
                    if name in owner.own:
                        return member_of(owner, name)
                    if "__getattr__" in owner.own:
                        unknown = Unknown(name)
                case Outside():
                    if owner.value is not object and (
                        hasattr(owner.value, name) or name in annotated_names(owner.value)
                    ):
                        return Outside(f"{owner.dotted}.{name}")
                case Unknown():
                    unknown = owner
        if unknown is None and hasattr(object, name):
            return Outside(f"builtins.object.{name}")
        return unknown

    def abstract(self, cls: Class) -> list[str]:
        """The abstract members that a class does not implement."""
        names = {name for owner in self.mro(cls) if isinstance(owner, Class) for name in owner.own}
        found = ((name, self.attribute(cls, name)) for name in sorted(names))
        return [name for name, member in found if isinstance(member, Function) and member.is_abstract]

    def signature(self, function: Function) -> inspect.Signature:
        """Without `self` for methods."""
        all_of_them = list(parameters(function.node.args))
        bound = function.owner is not None and function.kind != "staticmethod"
        return inspect.Signature(all_of_them[1:] if bound else all_of_them)

    def constructor(self, cls: Class) -> tuple[inspect.Signature, Function | None] | None:
        """The signature of `cls(...)` and the function that has it, if any. None: unknown."""
        if self._has_fields(cls):
            return inspect.Signature(list(self._fields(cls))), None
        found = self.attribute(cls, "__init__")
        if isinstance(found, Function):
            return self.signature(found), found
        return None

    def _has_fields(self, cls: Class) -> bool:
        for owner in self.mro(cls):
            if isinstance(owner, Outside) and owner.dotted.rpartition(".")[2] in _FIELD_BASES:
                return True
            if isinstance(owner, Class):
                if "__init__" in owner.own:
                    return False
                if any(self._makes_fields(owner.module, decorator) for decorator in owner.node.decorator_list):
                    return True
        return False

    def _makes_fields(self, module: Module, decorator: ast.expr) -> bool:
        if last_name(decorator) in _FIELDS_BY:
            return True
        found = self.look_up(module, decorator.func if isinstance(decorator, ast.Call) else decorator)
        return isinstance(found, Function) and any(last_name(each) in _FIELDS_BY for each in found.node.decorator_list)

    def _fields(self, cls: Class) -> Iterator[inspect.Parameter]:
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        found: dict[str, ast.AnnAssign] = {}
        for owner in reversed(self.mro(cls)):
            if isinstance(owner, Class):
                lines = [line for line in owner.node.body if isinstance(line, ast.AnnAssign)]
                found |= {line.target.id: line for line in lines if isinstance(line.target, ast.Name)}
        places: list[inspect.Parameter] = []
        words: list[inspect.Parameter] = []
        for name, line in found.items():
            text = ast.unparse(line.annotation)
            options = line.value.keywords if isinstance(line.value, ast.Call) else []
            if text.startswith(("ClassVar", "typing.ClassVar")):
                continue
            by_word = any(option.arg == "kw_only" for option in options)
            required = line.value is None or (by_word and not any("default" in (o.arg or "") for o in options))
            default = empty if required and "NotRequired" not in text else None
            if by_word:
                words.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
            else:
                after = bool(places) and places[-1].default is None
                places.append(inspect.Parameter(name, kind, default=None if after else default))
        yield from (*places, *words)
