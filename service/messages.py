"""What every message between clients, gateway, queue and worker is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Message(BaseModel):
    """Base of all messages: strict types, no unknown fields, no NaN, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def field_error(field: str, message: str) -> PydanticCustomError:
    """What a rule over several fields raises, to name the one at fault."""
    return PydanticCustomError("fields", "{reason}", {"reason": message, "field": field})
