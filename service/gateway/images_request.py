"""The bodies of OpenAI's image calls, and what they mean here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema, model_validator

from service.errors import InvalidRequest
from service.gateway.jobs import check
from service.gateway.validation import validated
from service.messages import field_error
from service.sampler_options import Quality
from service.schemas import GenerationRequest, ModelCard, OutputFormat

ELSEWHERE = "is not something these models can do"
PICTURES = ("image", "mask", "strength")
QUALITIES = {
    "low": Quality.DRAFT,
    "draft": Quality.DRAFT,
    "auto": Quality.STANDARD,
    "medium": Quality.STANDARD,
    "standard": Quality.STANDARD,
    "high": Quality.HIGH,
    "hd": Quality.HIGH,
}
"""OpenAI's words and ours."""
REFUSED = {
    "complexity": ELSEWHERE,
    "frame_count": ELSEWHERE,
    "frame_duration_ms": ELSEWHERE,
    "svg": ELSEWHERE,
    "width": "ask for a size instead",
    "height": "ask for a size instead",
    "previews": "ask for partial_images instead",
}


class OpenAIRequest(GenerationRequest):
    """OpenAI's fields on top of our own, which its client sends as ``extra_body``.

    A value that would change nothing here is refused rather than ignored. ``user`` and ``safety_identifier`` are
    the exception: they are accepted, as they ask for nothing, and given back.
    """

    refused: ClassVar[dict[str, str]] = REFUSED

    prompt: str | None = Field(
        None, min_length=1, max_length=2000, description="For a class-conditional model, the name of a class."
    )
    quality: Annotated[
        Quality | None, WithJsonSchema({"anyOf": [{"enum": list(QUALITIES), "type": "string"}, {"type": "null"}]})
    ] = Field(None, strict=False, description="A preset; `auto` is `medium`, or what `sampler` says.")
    size: str = Field(
        "auto", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="`auto`, or `WxH` to resample the picture to."
    )
    output_compression: int = Field(100, ge=0, le=100, description="Quality of webp and jpeg.")
    background: Literal["auto", "opaque"] = "auto"
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="A `url` asks for the same API key.")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="With `stream`: pictures, as PNG, sent on the way.")
    user: str | None = Field(None, max_length=1000)
    safety_identifier: str | None = Field(None, max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        for name in given.keys() & cls.refused.keys():
            raise field_error(name, cls.refused[name])
        quality = given.get("quality", "auto")
        if quality == "auto" and "sampler" in given:
            given.pop("quality", None)
        elif isinstance(quality, str):
            given["quality"] = QUALITIES.get(quality, quality)
        return given

    @model_validator(mode="after")
    def _openai_fields_go_together(self) -> OpenAIRequest:
        if self.partial_images and not self.stream:
            raise field_error("partial_images", "needs stream=true")
        if self.stream and self.response_format == "url":
            raise field_error("response_format", "events carry b64_json only")
        if self.output_compression < 100 and self.output_format is OutputFormat.PNG:
            raise field_error("output_compression", "png is lossless: ask for webp or jpeg")
        return self

    @property
    def caller(self) -> str | None:
        """Who the caller says is asking: OpenAI's effective safety identifier."""
        return self.safety_identifier or self.user or None

    def generation(self, card: ModelCard) -> GenerationRequest:
        """The same request in native terms, for ``card``'s model."""
        fields = {name: getattr(self, name) for name in GenerationRequest.model_fields}
        fields |= {"model": card.name, "previews": self.partial_images > 0}
        if self.size != "auto":
            fields["width"], fields["height"] = map(int, self.size.split("x"))
        if card.kind == "class" and self.prompt is not None:
            fields |= {"prompt": None, "class_label": self.prompt}
        try:
            generation = validated(GenerationRequest, fields)
            check(generation, card)
        except InvalidRequest as error:
            if error.field in ("width", "height"):
                error.message, error.field = f"{error.field}: {error.message}", "size"
            if error.field == "class_label" and self.class_label is None:
                error.field = "prompt"  # what the caller knows it by
            raise
        return generation


class ImagesRequest(OpenAIRequest):
    """What ``/v1/images/generations`` takes."""

    refused: ClassVar[dict[str, str]] = REFUSED | dict.fromkeys(PICTURES, "is for /v1/images/edits")

    moderation: Literal["auto"] = "auto"
    style: Literal["auto"] = "auto"


class EditRequest(OpenAIRequest):
    """What ``/v1/images/edits`` takes, once its files are read."""

    refused: ClassVar[dict[str, str]] = REFUSED | {"input_fidelity": "is said by strength", "markup": ELSEWHERE}

    image: str = Field(min_length=1, description="A file: PNG, WebP or JPEG.", json_schema_extra={"format": "binary"})
    mask: str | None = Field(
        None,
        min_length=1,
        description="A file as large as `image`: what is fully transparent may change, all else is kept.",
        json_schema_extra={"format": "binary"},
    )
