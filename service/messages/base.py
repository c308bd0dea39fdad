"""The base class of all messages between clients, gateway, queue and worker."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Message(BaseModel):
    """Base of all messages: strict types, no unknown fields, no NaN, immutable; errors do not repeat the input."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True, hide_input_in_errors=True)


class Request(Message):
    """Base of what callers ask for: null means the default, as many clients write every field they know."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if not cls._may_be_left_out(name, value)}

    @classmethod
    def _may_be_left_out(cls, name: str, value: Any) -> bool:
        field = cls.model_fields.get(name)
        return value is None and field is not None and not field.is_required()


class LooseRequest(Request):
    """Base of requests of protocols that are not ours, which say that unknown fields are passed over."""

    model_config = ConfigDict(extra="ignore")


def field_error(field: str, message: str) -> PydanticCustomError:
    """Builds the error of a rule over several fields. It names the field at fault."""
    return PydanticCustomError("fields", "{reason}", {"reason": message, "field": field})
