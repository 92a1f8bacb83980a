"""The descriptions of config keys: the strings below them in the source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise

from pydantic import BaseModel


def description_of(section: type[BaseModel], key: str) -> str:
    """That of the section; where it only changes the default, that of the section that it inherits from. Empty if the
    key has none.

    pydantic reads these texts itself with `use_attribute_docstrings`, but for all sections whenever a command starts.
    """
    for kind in section.__mro__:
        if key in inspect.get_annotations(kind) and (text := _descriptions(kind).get(key, "")):
            return text
    return ""


@cache
def _descriptions(kind: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    if not isinstance(tree, ast.ClassDef):
        return {}
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
