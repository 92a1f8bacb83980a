"""Checks all uses of a library that our sources make; see tests.contract.uses for how they are found."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.contract.sources import Class, Function, Module, Outside, Symbol, Unknown, Value, source
from tests.contract.uses import Instance, Method, Scope, Type, Types, classes, expressions
from tests.contract.world import World

_REMOTE = "collective_rpc"


@dataclass
class Report:
    """`uses`: what was found and checked; `problems`: what the library does not have, or not so; `definitions`: the
    syntax trees of the functions and classes that we use, as text."""

    uses: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    definitions: dict[str, str] = field(default_factory=dict)

    def add(self, module: Module, node: ast.AST, use: str, problem: str | None) -> None:
        self.uses.add(use)
        line = f"{module.name}:{getattr(node, 'lineno', '?')}: {use}: {problem}"
        if problem is not None and line not in self.problems:
            self.problems.append(line)


class Contract:
    """Args:
    library: the name of the library's package.
    workers: dotted name of the classes whose methods `collective_rpc` calls by name.
    """

    def __init__(self, world: World, library: str, *, workers: Iterable[str] = ()) -> None:
        self._world, self._library = world, library
        self._workers = list(workers)
        self.report = Report()

    def check(self, names: Iterable[str]) -> Report:
        """Checks these modules of ours."""
        modules = [found for name in names if isinstance(found := self._world.module(name), Module)]
        called = {node.attr for module in modules for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
        for module in modules:
            self._imports(module)
            forwarders = _forwarders(module)
            for worker in self._worker_classes() or [None]:
                self._expressions(module, worker, forwarders)
            for cls in classes(module, self._world):
                if any(self._is_theirs(base) for base in self._world.mro(cls)):
                    self._subclass(cls, called)
        return self.report

    def _worker_classes(self) -> list[Class | None]:
        return [found for name in self._workers if isinstance(found := self._world.find(name), Class)]

    def _is_theirs(self, symbol: object) -> bool:
        """Whether it belongs to the library."""
        return isinstance(symbol, Module | Class) and self._is_inside(symbol.name)

    def _is_inside(self, name: str) -> bool:
        return name.partition(".")[0] == self._library

    def _imports(self, module: Module) -> None:
        for node in ast.walk(module.tree):
            wanted: dict[str, Symbol | None] = {}
            if isinstance(node, ast.Import):
                wanted = {alias.name: self._world.module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and self._is_inside(origin := source(module, node)):
                wanted = {f"{origin}.{each.name}": self._world.imported(origin, each.name) for each in node.names}
            for name, found in wanted.items():
                if self._is_inside(name):
                    self._note(found)
                    self.report.add(module, node, name, None if found is not None else "there is no such name")

    def _note(self, found: Symbol | None) -> None:
        """Keeps the text of what we depend on: of a function, or of a class and its bases."""
        if isinstance(found, Class):
            for base in self._world.mro(found):
                if isinstance(base, Class) and self._is_theirs(base):
                    self.report.definitions[base.name] = ast.dump(base.node)
        elif isinstance(found, Function) and self._is_theirs(found.module):
            self.report.definitions[found.name] = ast.dump(found.node)
        elif isinstance(found, Value) and self._is_theirs(found.module):
            self.report.definitions[f"{found.module.name}: {ast.unparse(found.node)}"] = ""

    def _expressions(self, module: Module, worker: Class | None, forwarders: set[str]) -> None:
        sent = {} if worker is None else {(module.name, name): worker for name in _sent_functions(module, forwarders)}
        types = Types(self._world, sent=sent)
        for node, scope in expressions(module, self._world):
            match node:
                case ast.Attribute(value=value, attr=name):
                    self._attribute(module, node, types.type_of(value, scope), name, types)
                case ast.Call():
                    self._call(module, node, scope, types)
                    if worker is not None:
                        self._remote(module, node, worker, forwarders)

    def _attribute(self, module: Module, node: ast.Attribute, held: Type, name: str, types: Types) -> None:
        of = held.of if isinstance(held, Instance) else held
        if isinstance(of, Class):
            if not any(self._is_theirs(base) for base in self._world.mro(of)):
                return
        elif not self._is_theirs(of):
            return
        found = types.attribute(held, name)
        if isinstance(of, Module):
            self._note(self._world.member(of, name))
        self.report.add(module, node, f"{of.name}.{name}", None if found is not None else "there is no such attribute")

    def _call(self, module: Module, node: ast.Call, scope: Scope, types: Types) -> None:
        called = types.type_of(node.func, scope)
        signature: inspect.Signature | None = None
        function: Function | None = None
        name = ""
        if isinstance(called, Class) and any(self._is_theirs(base) for base in self._world.mro(called)):
            signature, function = self._world.constructor(called) or (None, None)
            name = called.name
        elif isinstance(called, Method | Function):
            function = called.function if isinstance(called, Method) else called
            if not self._is_theirs(function.module):
                return
            signature = self._world.signature(function)
            name = function.name
            self._note(function)
        if signature is not None:
            problem = mismatch(signature, node) or self._passed_on(function, signature, node)
            self.report.add(module, node, f"{name}({_shown(node)})", problem)
            self._protocols(module, node, scope, types, function)

    def _passed_on(self, function: Function | None, signature: inspect.Signature, node: ast.Call) -> str | None:
        """Why keywords that fall into **kwargs don't fit where the function passes them on. None: they fit."""
        catch = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        if function is None or catch is None:
            return None
        extra = [word for word in node.keywords if word.arg is not None and word.arg not in signature.parameters]
        types = Types(self._world)
        for call in ast.walk(function.node):
            if isinstance(call, ast.Call) and any(
                word.arg is None and isinstance(word.value, ast.Name) and word.value.id == catch
                for word in call.keywords
            ):
                called = types.type_of(call.func, Scope(function.module, function.node, function.owner))
                target = self._world.constructor(called) if isinstance(called, Class) else None
                if target is not None:
                    self._note(called if isinstance(called, Class) else None)
                    return mismatch(target[0], ast.Call(call.func, [], extra), partial=True)
        return None

    def _protocols(self, module: Module, node: ast.Call, scope: Scope, types: Types, function: Function | None) -> None:
        """Objects of ours that are passed where the library asks for a Protocol must have its members."""
        if function is None:
            return
        arguments = function.node.args
        annotations = {each.arg: each.annotation for each in (*arguments.args, *arguments.kwonlyargs)}
        for word in node.keywords:
            wanted = types.annotated(annotations.get(word.arg or ""), function.module)
            given = types.type_of(word.value, scope)
            if not isinstance(wanted, Instance) or not isinstance(given, Instance) or self._is_theirs(given.of):
                continue
            if not any(
                isinstance(base, Outside) and base.dotted == "typing.Protocol" for base in self._world.mro(wanted.of)
            ):
                continue
            for name in wanted.of.own:
                theirs, ours = self._world.attribute(wanted.of, name), self._world.attribute(given.of, name)
                problem = "is missing" if ours is None else self._unlike(ours, theirs)
                self.report.add(module, node, f"{given.of.name}.{name} as {wanted.of.name}.{name}", problem)

    def _remote(self, module: Module, node: ast.Call, worker: Class, forwarders: set[str]) -> None:
        """A method of the workers that is called by its name."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name not in {_REMOTE, *forwarders} or not node.args:
            return
        method = node.args[0]
        if not isinstance(method, ast.Constant) or not isinstance(method.value, str):
            return
        found = self._world.attribute(worker, method.value)
        problem = None if isinstance(found, Function | Unknown) else "there is no such method"
        if isinstance(found, Function) and name != _REMOTE:
            self._note(found)
            problem = mismatch(self._world.signature(found), ast.Call(node.func, [], node.keywords))
        self.report.add(module, node, f"{worker.name}.{method.value}({_shown(node)})", problem)

    def _subclass(self, cls: Class, called: set[str]) -> None:
        """What a class of ours overrides must be of the same kind and take what the library passes."""
        module = cls.module
        bases = [base for base in self._world.mro(cls) if self._is_theirs(base)]
        is_open = any(isinstance(base, Unknown) for base in self._world.mro(cls))
        for base in bases:
            self._note(base)  # type: ignore[arg-type]
        for name, members in cls.own.items():
            theirs = next((base for base in bases if isinstance(base, Class) and name in base.own), None)
            node = members[0].node if isinstance(members[0], Function) else members[0]
            if name == "__init__":
                continue
            if theirs is not None:
                problem = self._unlike(self._world.attribute(cls, name), self._world.attribute(theirs, name))
                self.report.add(module, node, f"{cls.name}.{name} overrides {theirs.name}.{name}", problem)
            elif not is_open and isinstance(members[0], Function) and not self._is_used(cls, name, called):
                problem = f"nothing calls it: {' and '.join(b.name for b in bases[:1])} has no such member"  # type: ignore[union-attr]
                self.report.add(module, node, f"{cls.name}.{name}", problem)
        missing = self._world.abstract(cls)
        problem = f"does not implement {', '.join(missing)}" if missing else None
        self.report.add(module, cls.node, f"{cls.name} is complete", problem)

    def _is_used(self, cls: Class, name: str, called: set[str]) -> bool:
        outside = [base.value for base in self._world.mro(cls) if isinstance(base, Outside)]
        return name in called or any(hasattr(value, name) for value in (*outside, object))

    def _unlike(self, ours: Symbol | None, theirs: Symbol | None) -> str | None:
        """Why one member can't stand for another. None: it can."""
        if not isinstance(theirs, Function):
            return (
                "is a method, and theirs is a value" if isinstance(ours, Function) and ours.kind == "method" else None
            )
        if not isinstance(ours, Function):
            return (
                None
                if "property" in theirs.kind or isinstance(ours, Unknown | Outside)
                else f"theirs is a {theirs.kind}"
            )
        if ours.kind != theirs.kind and not ("property" in ours.kind and theirs.kind == "property"):
            return f"is a {ours.kind}, and theirs is a {theirs.kind}"
        if "property" in theirs.kind:
            return None
        return _narrower(self._world.signature(ours), self._world.signature(theirs))


def _narrower(ours: inspect.Signature, theirs: inspect.Signature) -> str | None:
    """Why a call that fits `theirs` may not fit `ours`."""
    mine = ours.parameters
    takes_words = any(p.kind is p.VAR_KEYWORD for p in mine.values())
    takes_places = any(p.kind is p.VAR_POSITIONAL for p in mine.values())
    for place, (name, wanted) in enumerate(theirs.parameters.items()):
        if wanted.kind in (wanted.VAR_KEYWORD, wanted.VAR_POSITIONAL):
            continue
        if name not in mine and not takes_words:
            return f"does not take {name!r}: theirs is {theirs}"
        at = list(mine).index(name) if name in mine else None
        if wanted.kind is not wanted.KEYWORD_ONLY and at != place and not takes_places:
            return f"takes {name!r} at another place: theirs is {theirs}"
    required = [
        p.name for p in mine.values() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    extra = [name for name in required if name not in theirs.parameters]
    return f"needs {', '.join(extra)}, which theirs does not pass" if extra else None


def mismatch(signature: inspect.Signature, node: ast.Call, *, partial: bool = False) -> str | None:
    """Why a call does not fit a signature. None: it fits, as far as stars let it be seen."""
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    spread = any(word.arg is None for word in node.keywords)
    places = [] if starred else [None] * len(node.args)
    words = {word.arg: None for word in node.keywords if word.arg is not None}
    try:
        (signature.bind_partial if starred or spread or partial else signature.bind)(*places, **words)
    except TypeError as error:
        return f"{error}; it takes {signature}"
    return None


def _shown(node: ast.Call) -> str:
    words = [f"{word.arg}=" if word.arg else "**" for word in node.keywords]
    return ", ".join(["*" if isinstance(each, ast.Starred) else "_" for each in node.args] + words)


def _forwarders(module: Module) -> set[str]:
    """Our functions that pass their first argument on to `collective_rpc`."""
    return {
        function.name
        for function in ast.walk(module.tree)
        if isinstance(function, ast.FunctionDef)
        and any(isinstance(node, ast.Attribute) and node.attr == _REMOTE for node in ast.walk(function))
    }


def _sent_functions(module: Module, forwarders: set[str]) -> set[str]:
    """Functions of the module that are passed to workers."""
    names = {_REMOTE, *forwarders}
    calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    return {
        call.args[0].id
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in names
        if call.args and isinstance(call.args[0], ast.Name)
    }


def users(root: Path, folders: Iterable[str], library: str) -> Iterator[str]:
    """The modules of ours in which the library's name occurs."""
    word = re.compile(rf"\b{library}\b")
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if word.search(path.read_text(encoding="utf-8")):
                yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
