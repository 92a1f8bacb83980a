"""What all sections of the configuration are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

Positive = Annotated[int, Field(gt=0)]


NonNegative = Annotated[int, Field(ge=0)]


PositiveNumber = Annotated[float, Field(gt=0.0)]


NonNegativeNumber = Annotated[float, Field(ge=0.0)]


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Dtype = Literal["bfloat16", "float32"]


Seconds = Annotated[float, Field(gt=0.0)]


def one_of(table: Mapping[str, Any], *more: str) -> AfterValidator:
    """Annotates a text that is a key of a table, or one of some words more."""

    def check(value: str) -> str:
        if value not in table and value not in more:
            raise PydanticCustomError("unknown_name", "must be one of {names}", {"names": ", ".join((*more, *table))})
        return value

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, eq=False)
class ByName:
    """Annotates a field that holds one of several sections, chosen by the section's key `name`.

    Only the keys of the chosen section are legal. Write `Annotated[SerializeAsAny[Base], ByName(TABLE, "default")]`,
    where the sections of TABLE derive from Base.
    """

    table: Mapping[str, type[Section]]
    default: str

    def section(self, value: Any) -> type[Section] | None:
        """The section that a value of the field has or chooses. None: there is no section of that name."""
        if isinstance(value, Section):
            return type(value)
        name = value.get("name", self.default) if isinstance(value, Mapping) else self.default
        return self.table.get(name) if isinstance(name, str) else None

    def owners(self, key: str) -> list[str]:
        """Names of the sections that have this key."""
        return [name for name, section in self.table.items() if key in section.model_fields]

    def _chosen(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        section = self.section(value)
        if section is None:
            problem = PydanticCustomError("unknown_name", "must be one of {names}", {"names": ", ".join(self.table)})
            details = InitErrorDetails(type=problem, loc=("name",), input=value["name"])
            raise ValidationError.from_exception_data("name", [details])
        return section.model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._chosen, handler(source))


def by_name(field: FieldInfo) -> ByName | None:
    """The choice of sections that a field holds, if it holds one."""
    return next((item for item in field.metadata if isinstance(item, ByName)), None)
