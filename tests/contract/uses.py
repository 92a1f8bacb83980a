"""Finds what our code uses of a library, from our sources, and checks it against the library's sources.

Types are inferred as far as names, annotations and constructor calls tell them: of imported names, of `self.x` that a
constructor or an annotated function of ours filled, of what the library's annotations promise of these. What is `Any`
in our code, such as the layers of a model, is not checked here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from tests.contract.sources import Class, Def, Function, Module, Symbol, Unknown, Value, flat, stored
from tests.contract.world import World

_SEQUENCES = {"list", "List", "Sequence", "Iterable", "Iterator", "tuple", "Generator", "Collection"}
_WRAPPERS = {"Optional", "Annotated", "Final", "ClassVar", "Required", "NotRequired", "Awaitable"}


@dataclass(frozen=True)
class Instance:
    of: Class


@dataclass(frozen=True)
class Method:
    """A function, bound to an instance or class."""

    function: Function


@dataclass(frozen=True)
class ListOf:
    item: Type


Type: TypeAlias = Symbol | Instance | Method | ListOf
NOTHING = Unknown()


@dataclass(frozen=True, eq=False)
class Scope:
    """A function or class body in which names are looked up. `outer`: the function around it."""

    module: Module
    function: Def | None = None
    cls: Class | None = None
    outer: Scope | None = None

    @property
    def first_argument(self) -> str | None:
        if self.function is None or "staticmethod" in map(ast.unparse, self.function.decorator_list):
            return None
        arguments = self.function.args
        return next((argument.arg for argument in (*arguments.posonlyargs, *arguments.args)), None)

    @cached_property
    def locals(self) -> Mapping[str, tuple[str, ast.expr]]:
        """By name: how it is bound (annotation, value, item, entered) and by which expression. Names that are bound
        in two ways are left out."""
        found: dict[str, list[tuple[str, ast.expr]]] = {}
        if self.function is None:
            return {}
        arguments = self.function.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            how = ("annotation", argument.annotation) if argument.annotation else ("value", ast.Constant(None))
            found.setdefault(argument.arg, []).append(how)
        for node in ast.walk(self.function):
            for kind, target, value in _bindings(node):
                for name in stored(target):
                    how = (kind, value) if isinstance(target, ast.Name) else ("value", ast.Constant(None))
                    found.setdefault(name, []).append(how)
        narrowed = set(_narrowed(self.function))
        return {
            name: many[0] if name not in narrowed else ("value", ast.Constant(None))
            for name, many in found.items()
            if many[0][0] == "annotation" or len({(kind, ast.dump(node)) for kind, node in many}) == 1
        }


class Types:
    """Infers the types of expressions.

    Args:
        sent: by (module, name) of a function that is called elsewhere with an object of a known class: that class.
    """

    def __init__(self, world: World, *, sent: Mapping[tuple[str, str], Class] | None = None) -> None:
        self._world, self._sent = world, sent or {}
        self._open: set[ast.AST] = set()

    def type_of(self, node: ast.expr, scope: Scope) -> Type:
        if node in self._open:
            return NOTHING
        self._open.add(node)
        try:
            return self._type_of(node, scope)
        finally:
            self._open.discard(node)

    def _type_of(self, node: ast.expr, scope: Scope) -> Type:
        match node:
            case ast.Name(name):
                return self._name(name, scope)
            case ast.Attribute(value, name):
                return self.attribute(self.type_of(value, scope), name) or NOTHING
            case ast.Call(func=ast.Name("getattr"), args=[_, _, otherwise]):
                return self.type_of(otherwise, scope)
            case ast.Call(func=ast.Name("super"), args=[]) if scope.cls is not None:
                bases = [base for base in self._world.mro(scope.cls)[1:] if isinstance(base, Class)]
                return Instance(bases[0]) if bases else NOTHING
            case ast.Call(func=func):
                return self.returned(self.type_of(func, scope))
            case ast.Subscript(value=value):
                held = self.type_of(value, scope)
                return held.item if isinstance(held, ListOf) and not isinstance(node.slice, ast.Slice) else held
            case ast.Await(value=value) | ast.NamedExpr(value=value):
                return self.type_of(value, scope)
            case ast.IfExp(body=body):
                return self.type_of(body, scope)
        return NOTHING

    def _name(self, name: str, scope: Scope) -> Type:
        at: Scope | None = scope
        while at is not None:
            if at.cls is not None and at.function is not None and name == at.first_argument:
                return at.cls if "classmethod" in map(ast.unparse, at.function.decorator_list) else Instance(at.cls)
            if name in at.locals:
                return self._of_local(at.locals[name], at)
            at = at.outer
        symbol = self._world.member(scope.module, name)
        return self.declared(symbol) if isinstance(symbol, Value) else symbol or NOTHING

    def _of_local(self, found: tuple[str, ast.expr], scope: Scope) -> Type:
        kind, node = found
        if kind == "annotation":
            if scope.function and scope.cls is None and scope.function.args.args[:1]:
                sent = self._sent.get((scope.module.name, scope.function.name))
                if sent is not None and node is scope.function.args.args[0].annotation:
                    return Instance(sent)
            return self.annotated(node, scope.module)
        held = self.type_of(node, scope)
        if kind == "item":
            return held.item if isinstance(held, ListOf) else NOTHING
        if kind == "entered":
            entered = self.attribute(held, "__enter__")
            return self.returned(entered) if isinstance(entered, Method) else held
        return held

    def attribute(self, held: Type, name: str) -> Type | None:
        """None: there is no such attribute."""
        match held:
            case Instance(of):
                found = self._world.attribute(of, name)
                if isinstance(found, Function):
                    if "property" in found.kind:
                        return self.annotated(found.node.returns, found.module)
                    return Method(found)
                return self.declared(found, of) if isinstance(found, Value) else found
            case Class():
                found = self._world.attribute(held, name)
                if isinstance(found, Function):
                    return Method(found) if found.kind in ("classmethod", "staticmethod") else found
                return self.declared(found, held) if isinstance(found, Value) else found
            case ListOf() | Method() | Function():
                return NOTHING
        return self._world.member(held, name)

    def declared(self, value: Value, owner: Class | None = None) -> Type:
        """The type of a module's or class's variable."""
        match value.node:
            case ast.AnnAssign(annotation=annotation):
                return self.annotated(annotation, value.module)
            case ast.Assign(value=assigned):
                return self.type_of(assigned, Scope(value.module))
            case ast.Expr(value=written):
                found = self.annotated(written, value.module)
                if not isinstance(found, Unknown) or owner is None:
                    return found
                return self.type_of(written, _where(written, value.module, owner, self._world))
        return NOTHING

    def returned(self, called: Type) -> Type:
        match called:
            case Class():
                return Instance(called)
            case Method(function) | (Function() as function):
                return self.annotated(function.node.returns, function.module)
        return NOTHING

    def annotated(self, node: ast.expr | None, module: Module) -> Type:
        """What an annotation promises."""
        match node:
            case ast.Constant(str(text)):
                return self.annotated(ast.parse(text, mode="eval").body, module)
            case ast.BinOp(left, ast.BitOr(), right):
                one, other = self.annotated(left, module), self.annotated(right, module)
                return one if isinstance(other, Unknown) else other if isinstance(one, Unknown) else NOTHING
            case ast.Subscript(value, inner):
                name = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
                first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
                if name in _SEQUENCES:
                    return ListOf(self.annotated(first, module))
                if name in _WRAPPERS:
                    return self.annotated(first, module)
                if name == "type":
                    found = self._world.look_up(module, first)
                    return found if isinstance(found, Class) else NOTHING
                return self.annotated(value, module)
            case ast.Name() | ast.Attribute():
                found = self._world.look_up(module, node)
                return Instance(found) if isinstance(found, Class) else NOTHING
        return NOTHING


def _where(written: ast.expr, module: Module, cls: Class, world: World) -> Scope:
    """The method of a class, or of a base, in which an expression stands."""
    for owner in world.mro(cls):
        if isinstance(owner, Class) and owner.module is module:
            for statement in flat(owner.node.body):
                if isinstance(statement, ast.FunctionDef) and any(node is written for node in ast.walk(statement)):
                    return Scope(module, statement, owner)
    return Scope(module)


def _narrowed(function: Def) -> Iterator[str]:
    """Names whose type a function tests; only a type checker can follow that."""
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name("isinstance"), args=[ast.Name(name), _]) | ast.Match(subject=ast.Name(name)):
                yield name


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """(how, target, expression) of a statement or clause that binds names."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield "value", target, value
        case ast.AnnAssign(target=target, annotation=annotation):
            yield "annotation", target, annotation
        case ast.NamedExpr(target=target, value=value):
            yield "value", target, value
        case ast.For(target=target, iter=value) | ast.AsyncFor(target=target, iter=value):
            yield "item", target, value
        case ast.comprehension(target=target, iter=value):
            yield "item", target, value
        case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
            yield "entered", target, value


def expressions(module: Module, world: World) -> Iterator[tuple[ast.expr, Scope]]:
    """All expressions of a module with their scopes."""
    yield from _walk(module.tree, Scope(module), world)


def _walk(node: ast.AST, scope: Scope, world: World) -> Iterator[tuple[ast.expr, Scope]]:
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            own = scope.cls if scope.function is None else None
            inner = Scope(scope.module, child, own, scope if scope.function else None)
        elif isinstance(child, ast.ClassDef) and scope.function is None:
            found = world.member(scope.module, child.name)
            inner = Scope(scope.module, None, found if isinstance(found, Class) else None)
        if isinstance(child, ast.expr):
            yield child, scope
        yield from _walk(child, inner, world)


def classes(module: Module, world: World) -> Sequence[Class]:
    found = (world.member(module, node.name) for node in module.tree.body if isinstance(node, ast.ClassDef))
    return [cls for cls in found if isinstance(cls, Class)]
