"""Python packages as sources: what a dotted name means, without importing anything of the package.

A GPU wheel can't be imported where there is no GPU, but its Python files can be read. Names are followed through
imports, both branches of an `if` count, and what lies outside of the given packages is imported for real.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

_FIELDS_BY = {"dataclass", "dataclass_transform", "define"}
_FIELD_BASES = {"TypedDict", "NamedTuple", "Struct", "BaseModel"}
OURS = ("actors", "benchmarks", "jobs", "orchestrator", "tests")
Def: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Unknown:
    """Nothing is known: any use of it passes. `of`: what it belongs to, for reports."""

    of: str = ""


@dataclass(frozen=True)
class Real:
    """A compiled module of an installed package, or an object in it."""

    value: Any


@dataclass(frozen=True)
class Outside:
    """A name of a package that is not looked at; imported only where it is a base class."""

    dotted: str

    @cached_property
    def value(self) -> Any:
        """None: it can't be imported."""
        module, _, name = self.dotted.rpartition(".")
        if not module:
            return None
        found = _imported(module)
        return getattr(found.value, name, None) if found else getattr(Outside(module).value, name, None)


@dataclass(frozen=True, eq=False)
class Module:
    name: str
    tree: ast.Module
    is_package: bool

    @cached_property
    def bindings(self) -> Mapping[str, list[ast.stmt]]:
        """By name: the statements of the module that bind it, in all branches."""
        found: dict[str, list[ast.stmt]] = {}
        for statement in flat(self.tree.body):
            for name in _bound(statement):
                found.setdefault(name, []).append(statement)
        return found


@dataclass(frozen=True, eq=False)
class Function:
    node: Def
    module: Module
    owner: Class | None = None

    @property
    def kind(self) -> str:
        """method, property, cached_property, classmethod, staticmethod or function."""
        found = [name for name in map(_last, self.node.decorator_list) if name in _KINDS]
        return _KINDS[found[0]] if found else ("method" if self.owner else "function")

    @property
    def is_abstract(self) -> bool:
        return any(name.startswith("abstract") for name in map(_last, self.node.decorator_list))


@dataclass(frozen=True, eq=False)
class Class:
    node: ast.ClassDef
    module: Module
    own: dict[str, list[Function | ast.expr]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.module.name}.{self.node.name}"


@dataclass(frozen=True, eq=False)
class Value:
    """A name that is bound by an assignment or a loop."""

    node: ast.stmt
    module: Module


Symbol: TypeAlias = Unknown | Real | Outside | Module | Function | Class | Value
_KINDS = {
    "property": "property",
    "abstractproperty": "property",
    "cached_property": "cached_property",
    "classmethod": "classmethod",
    "staticmethod": "staticmethod",
}


class World:
    """Args:
    folders: the packages, by name: the folder that contains the package.
    installed: packages whose compiled modules may be imported.
    """

    def __init__(self, folders: Mapping[str, Path], *, installed: Iterable[str] = ()) -> None:
        self._folders, self._installed = folders, frozenset(installed)
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
            return _imported(name) if top in self._installed else Unknown(name)
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
                return Real(getattr(value, name)) if hasattr(value, name) else _submodule(value, name)
            case Outside(dotted):
                return Outside(f"{dotted}.{name}")
        return Unknown(name)

    def _of_module(self, module: Module, name: str) -> Symbol | None:
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
        return None

    def _bound_to(self, module: Module, statement: ast.stmt, name: str) -> Symbol | None:
        match statement:
            case ast.ClassDef():
                return _class(statement, module)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                return Function(statement, module)
            case ast.Import(names):
                for alias in names:
                    if (alias.asname or alias.name.partition(".")[0]) == name:
                        return self.find(alias.name if alias.asname else name)
            case ast.ImportFrom(_, names):
                for alias in names:
                    if (alias.asname or alias.name) == name:
                        return self._from(source(module, statement), alias.name)
        return Value(statement, module)

    def _from(self, source: str, name: str) -> Symbol | None:
        found = self.find(source)
        return None if found is None else self.member(found, name)

    def _star(self, module: Module, statement: ast.stmt, name: str) -> Symbol | None:
        assert isinstance(statement, ast.ImportFrom)
        return self._from(source(module, statement), name)

    def look_up(self, module: Module, expression: ast.expr) -> Symbol | None:
        """The meaning of a dotted name in a module's scope. None: it has no meaning there."""
        match expression:
            case ast.Name(name):
                found = self._of_module(module, name)
                return found if found is not None else _builtin(name)
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
                case Outside():
                    if owner.value is not object and (hasattr(owner.value, name) or name in _annotated(owner.value)):
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
        parameters = list(_parameters(function.node.args))
        bound = function.owner is not None and function.kind != "staticmethod"
        return inspect.Signature(parameters[1:] if bound and parameters else parameters)

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
        if _last(decorator) in _FIELDS_BY:
            return True
        found = self.look_up(module, decorator.func if isinstance(decorator, ast.Call) else decorator)
        return isinstance(found, Function) and any(_last(each) in _FIELDS_BY for each in found.node.decorator_list)

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


def source(module: Module, statement: ast.ImportFrom) -> str:
    """The absolute name of the module that a statement imports from."""
    if not statement.level:
        return statement.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - statement.level + module.is_package]
    return ".".join([*parts, *filter(None, [statement.module])])


def member_of(owner: Class, name: str) -> Symbol:
    members = owner.own[name]
    functions = [member for member in members if isinstance(member, Function)]
    if functions:
        # The getter of a property; the implementation after its overloads.
        getters = [each for each in functions if each.kind in ("property", "cached_property")]
        return getters[0] if getters else functions[-1]
    annotated = [member for member in members if isinstance(member, ast.expr)]
    return Value(ast.Expr(annotated[0]), owner.module)


@cache
def _class(node: ast.ClassDef, module: Module) -> Class:
    found = Class(node, module)
    for statement in flat(node.body):
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found.own.setdefault(statement.name, []).append(Function(statement, module, found))
                for name, value in _set_on_self(statement):
                    found.own.setdefault(name, []).append(value)
            case ast.AnnAssign(target=ast.Name(name), annotation=annotation):
                found.own.setdefault(name, []).append(annotation)
            case ast.Assign(targets, value):
                for target in targets:
                    for name in stored(target):
                        found.own.setdefault(name, []).append(value)
            case ast.ClassDef(name):
                found.own.setdefault(name, []).append(ast.Name(name))
    return found


def _set_on_self(function: Def) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(function):
        targets: list[ast.expr] = []
        value: ast.expr = ast.Constant(None)
        match node:
            case ast.Assign(targets=many, value=assigned):
                targets = [part for target in many for part in (getattr(target, "elts", None) or [target])]
                value = assigned if not any(hasattr(target, "elts") for target in many) else value
            case ast.AnnAssign(target=target, annotation=annotation):
                targets, value = [target], annotation
            case ast.AugAssign(target=target):
                targets = [target]
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                yield target.attr, value


def flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a scope in all branches."""
    for statement in body:
        match statement:
            case ast.If() | ast.For() | ast.While():
                yield from flat([*statement.body, *statement.orelse])
            case ast.Try():
                handled = [line for handler in statement.handlers for line in handler.body]
                yield from flat([*handled, *statement.orelse, *statement.finalbody, *statement.body])
            case ast.With():
                yield from flat(statement.body)
            case _:
                yield statement


def _bound(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.ClassDef(name) | ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
            yield name
        case ast.Import(names):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
        case ast.ImportFrom(_, names):
            yield from (alias.asname or alias.name for alias in names)
        case ast.Assign(targets):
            yield from (name for target in targets for name in stored(target))
        case ast.AnnAssign(target=target):
            yield from stored(target)


def stored(target: ast.expr) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _last(decorator: ast.expr) -> str:
    if isinstance(decorator, ast.Call):
        return _last(decorator.func)
    return decorator.attr if isinstance(decorator, ast.Attribute) else getattr(decorator, "id", "")


def _parameters(arguments: ast.arguments) -> Iterator[inspect.Parameter]:
    kinds = inspect.Parameter
    ordered = [*arguments.posonlyargs, *arguments.args]
    required = len(ordered) - len(arguments.defaults)
    for place, argument in enumerate(ordered):
        kind = kinds.POSITIONAL_ONLY if place < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        yield kinds(argument.arg, kind, default=kinds.empty if place < required else None)
    if arguments.vararg:
        yield kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
    if arguments.kwarg:
        yield kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD)


def _annotated(value: Any) -> Mapping[str, Any]:
    return inspect.get_annotations(value) if isinstance(value, type) else {}


def _imported(name: str) -> Real | None:
    try:
        return Real(importlib.import_module(name))
    except ImportError:
        return None


def _submodule(value: Any, name: str) -> Symbol | None:
    return _imported(f"{value.__name__}.{name}") if inspect.ismodule(value) and hasattr(value, "__path__") else None


def _builtin(name: str) -> Outside | None:
    return Outside(f"builtins.{name}") if hasattr(builtins, name) else None
