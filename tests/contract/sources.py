"""Parsed Python files: modules, classes and functions with what they bind, in all branches."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeAlias

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
        found = really_imported(module)
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
    def name(self) -> str:
        return f"{self.owner.name if self.owner else self.module.name}.{self.node.name}"

    @property
    def kind(self) -> str:
        """method, property, cached_property, classmethod, staticmethod or function."""
        found = [name for name in map(last_name, self.node.decorator_list) if name in _KINDS]
        return _KINDS[found[0]] if found else ("method" if self.owner else "function")

    @property
    def is_abstract(self) -> bool:
        return any(name.startswith("abstract") for name in map(last_name, self.node.decorator_list))


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
def class_of(node: ast.ClassDef, module: Module) -> Class:
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


def last_name(decorator: ast.expr) -> str:
    if isinstance(decorator, ast.Call):
        return last_name(decorator.func)
    return decorator.attr if isinstance(decorator, ast.Attribute) else getattr(decorator, "id", "")


def parameters(arguments: ast.arguments) -> Iterator[inspect.Parameter]:
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


def annotated_names(value: Any) -> Mapping[str, Any]:
    return inspect.get_annotations(value) if isinstance(value, type) else {}


def really_imported(name: str) -> Real | None:
    try:
        return Real(importlib.import_module(name))
    except ImportError:
        return None


def submodule(value: Any, name: str) -> Symbol | None:
    return (
        really_imported(f"{value.__name__}.{name}") if inspect.ismodule(value) and hasattr(value, "__path__") else None
    )


def builtin(name: str) -> Outside | None:
    return Outside(f"builtins.{name}") if hasattr(builtins, name) else None
