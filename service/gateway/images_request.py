"""The body of OpenAI's image generation call, and what it means here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from service.errors import InvalidRequest
from service.gateway.jobs import check
from service.gateway.validation import validated
from service.schemas import GenerationRequest, ModelCard


class ImagesRequest(GenerationRequest):
    """OpenAI's fields on top of our own, which its client sends as ``extra_body``.

    A value that would change nothing here is refused rather than ignored. ``user`` and ``safety_identifier`` are
    the exception: they are accepted, as they ask for nothing, and kept nowhere.
    """

    prompt: str | None = Field(
        None, min_length=1, max_length=2000, description="For a class-conditional model, the name of a class."
    )
    previews: Literal[False] = Field(False, description="Ask for `partial_images` instead.")
    size: str = Field("auto", max_length=20, description="`auto`, or the model's own size as `WxH`.")
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto"] = "auto"
    style: Literal["auto"] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="With `stream`: pictures, as PNG, sent on the way.")
    user: str | None = Field(None, max_length=1000)
    safety_identifier: str | None = Field(None, max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, fields: Any) -> Any:
        return {name: v for name, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def generation(self, card: ModelCard) -> GenerationRequest:
        """The same request in native terms, for ``card``'s model."""
        if self.partial_images and not self.stream:
            raise InvalidRequest("needs stream=true", field="partial_images")
        fields = {name: getattr(self, name) for name in GenerationRequest.model_fields}
        fields |= {"model": card.name, "previews": self.partial_images > 0}
        if card.kind == "class" and self.prompt is not None:
            fields |= {"prompt": None, "class_label": self.prompt}
        try:
            generation = validated(GenerationRequest, fields)
            check(generation, card)
        except InvalidRequest as error:
            if error.field == "class_label" and self.class_label is None:
                error.field = "prompt"  # what the caller knows it by
            raise
        return generation
