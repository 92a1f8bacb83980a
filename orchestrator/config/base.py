"""Base class and types of all configuration sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

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
    """Annotates a string that must be a key of the table or one of the extra words."""

    def check(value: str) -> str:
        if value not in table and value not in more:
            raise PydanticCustomError("unknown_name", "must be one of {names}", {"names": ", ".join((*more, *table))})
        return value

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


def changed_key(section: Section, *names: str) -> str | None:
    """The first of these keys whose value is not its default."""
    fields = type(section).model_fields
    return next((name for name in names if getattr(section, name) != fields[name].default), None)


@dataclass(frozen=True, eq=False)
class ByName:
    """Annotates a field that holds one of several sections. The key `name` of the section selects which.

    Only the keys of the selected section are legal. Usage: `Annotated[SerializeAsAny[Base], ByName(TABLE, "default")]`,
    where the sections in TABLE are subclasses of Base.
    """

    table: Mapping[str, type[Section]]
    default: str

    def section(self, value: Any) -> type[Section] | None:
        """The section class of a value. None: the name is unknown."""
        if isinstance(value, Section):
            return type(value)
        name = value.get("name", self.default) if isinstance(value, Mapping) else self.default
        return self.table.get(name) if isinstance(name, str) else None

    def owners(self, key: str) -> list[str]:
        """Names of the sections with this key."""
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
    """The ByName annotation of a field, if it has one."""
    return next((item for item in field.metadata if isinstance(item, ByName)), None)


def by_name_in_mapping(field: FieldInfo) -> ByName | None:
    """The ByName annotation of the values of a field that maps names to sections, if it has one."""
    annotations = (extra for inner in get_args(field.annotation) for extra in get_args(inner)[1:])
    return next((item for item in annotations if isinstance(item, ByName)), None)
