"""The request bodies of OpenAI's image calls, and their translation into our own requests."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.defaults import check_fits_model
from patchforge.service.gateway.validation import validated
from patchforge.service.messages.base import field_error
from patchforge.service.messages.partials import MAX_PARTIAL_IMAGES
from patchforge.service.messages.samplers import Quality
from patchforge.service.messages.schemas import GenerationRequest, ModelCard, OutputFormat

UNSUPPORTED = "not supported; leave it out"
TEXTS = ("prompt", "negative_prompt", "class_label")
"""Fields whose empty text is not the same as no text. Any other field that is empty was not filled in."""
STANDINS = ("dall-e-2",)
"""Names that clients send if their user names no model: the API's own default."""
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
"""Our preset for each value of `quality`, OpenAI's values and our own."""
REFUSED = {
    "complexity": UNSUPPORTED,
    "frame_count": UNSUPPORTED,
    "frame_duration_ms": UNSUPPORTED,
    "svg": UNSUPPORTED,
    "input_fidelity": "not supported; use `strength`",
    "width": "not supported here; use `size`",
    "height": "not supported here; use `size`",
    "previews": "not supported here; use `partial_images`",
}
RETIRED = {
    "style": ("auto", "not supported; describe the style in `prompt`"),
    "moderation": ("auto", "not supported; nothing is moderated here, so leave it out"),
    "background": ("auto", "opaque", "not supported; every picture is opaque, so leave it out"),
}
"""Parameters of which only the values listed first are taken: they ask for what happens anyway. The last is advice."""


class OpenAIRequest(GenerationRequest):
    """OpenAI's fields and our own, which OpenAI's client sends as `extra_body`.

    Values that would have no effect are refused, not ignored. `user` and `safety_identifier` are the exception:
    they are accepted and returned.
    """

    refused: ClassVar[dict[str, str]] = REFUSED

    prompt: str | None = Field(
        None, min_length=1, max_length=2000, description="For a class model: the name of a class."
    )
    quality: Annotated[
        Quality | None, WithJsonSchema({"anyOf": [{"enum": list(QUALITIES), "type": "string"}, {"type": "null"}]})
    ] = Field(None, strict=False, description="A preset. `auto` means `medium`, or no preset if `sampler` is given.")
    size: str = Field(
        "auto",
        pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$",
        description="`auto`, or `WxH`: the picture is resampled to this size.",
    )
    output_compression: int = Field(100, ge=0, le=100, description="Quality of webp and jpeg; png is lossless.")
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto"] = "auto"
    style: Literal["auto"] = "auto"
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="Default: both. A `url` needs the same API key."
    )
    stream: bool = False
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="With `stream`: number of partial pictures to send, as PNG."
    )
    user: str | None = Field(None, max_length=1000)
    safety_identifier: str | None = Field(None, max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _translate_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None and (value != "" or name in TEXTS)}
        for name in sorted(given.keys() & cls.refused.keys()):
            raise field_error(name, cls.refused[name])
        for name, (*taken, advice) in RETIRED.items():
            if given.get(name, taken[0]) not in taken:
                raise field_error(name, advice)
        quality = given.get("quality", "auto")
        if quality == "auto" and "sampler" in given:
            given.pop("quality", None)
        elif isinstance(quality, str):
            given["quality"] = QUALITIES.get(quality, quality)
        return given

    @model_validator(mode="after")
    def _check_combinations(self) -> OpenAIRequest:
        if self.partial_images and not self.stream:
            raise field_error("partial_images", "requires stream=true")
        if self.stream and self.response_format == "url":
            raise field_error("response_format", "must be b64_json with stream=true")
        if self.output_compression < 100 and self.output_format is OutputFormat.PNG:
            raise field_error("output_compression", "requires output_format webp or jpeg: png is lossless")
        return self

    @property
    def caller(self) -> str | None:
        """The end user that the caller names: `safety_identifier`, or else `user`."""
        return self.safety_identifier or self.user or None

    def generation(self, card: ModelCard) -> GenerationRequest:
        """Translates this request into our own, for `card`'s model.

        Raises:
            InvalidRequest: it does not fit the model; `field` is the name of the field in this request.
        """
        fields = {name: getattr(self, name) for name in GenerationRequest.model_fields}
        fields |= {"model": card.name, "previews": bool(self.partial_images)}
        if self.size != "auto":
            fields["width"], fields["height"] = map(int, self.size.split("x"))
        if card.kind == "class" and self.prompt is not None:
            fields |= {"prompt": None, "class_label": self.prompt}
        try:
            generation = validated(GenerationRequest, fields)
            check_fits_model(generation, card)
        except InvalidRequest as error:
            if error.field in ("width", "height"):
                error.message, error.field = f"{error.field}: {error.message}", "size"
            if error.field == "class_label" and self.class_label is None:
                error.field = "prompt"  # the field that the caller sent
            raise
        return generation


class ImagesRequest(OpenAIRequest):
    """The body of `/v1/images/generations`."""

    refused: ClassVar[dict[str, str]] = REFUSED | dict.fromkeys(PICTURES, "is only for /v1/images/edits")


class EditRequest(OpenAIRequest):
    """The body of `/v1/images/edits`, with its files in base64."""

    refused: ClassVar[dict[str, str]] = REFUSED | {"markup": UNSUPPORTED}

    image: str = Field(min_length=1, description="A file: PNG, WebP or JPEG.", json_schema_extra={"format": "binary"})
    mask: str | None = Field(
        None,
        min_length=1,
        description="A file of the same size as `image`: fully transparent pixels may change, all others are kept.",
        json_schema_extra={"format": "binary"},
    )


REFERENCE = {
    "type": "object",
    "properties": {"image_url": {"type": "string", "description": "A data URL, or the file in base64."}},
    "required": ["image_url"],
}


def _describe_references(schema: dict[str, Any]) -> None:
    """Documents what `JsonEditRequest` takes in place of files."""
    schema["properties"].pop("image")
    schema["properties"]["images"] = {"type": "array", "items": REFERENCE, "minItems": 1, "maxItems": 1}
    schema["properties"]["mask"] = {"anyOf": [REFERENCE, {"type": "null"}]}
    schema["required"] = ["images"]


class JsonEditRequest(EditRequest):
    """The same as JSON: the picture is `images: [{"image_url": "data:image/png;base64,…"}]`, `mask` such an object."""

    model_config = ConfigDict(json_schema_extra=_describe_references)

    @model_validator(mode="before")
    @classmethod
    def _take_references(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        for name in given.keys() & {"images", "image"}:
            if isinstance(given[name], list):
                if len(given[name]) != 1:
                    raise field_error(name, "must have one entry: only one picture is supported")
                [given[name]] = given[name]
        if "images" in given:
            if "image" in given:
                raise field_error("images", "give only one of images and image")
            given["image"] = _read_reference(given.pop("images"), "images")
        for name in given.keys() & {"image", "mask"}:
            given[name] = _read_reference(given[name], name)
        return given


def _read_reference(value: Any, field: str) -> Any:
    """The picture that a reference holds, as text."""
    if not isinstance(value, dict):
        return value
    if value.get("file_id") is not None:
        raise field_error(field, "file_id is not supported; send the picture as a data URL in image_url")
    url = value.get("image_url", value.get("url"))
    if isinstance(url, dict):  # as in a chat message
        url = url.get("url")
    if not isinstance(url, str):
        raise field_error(field, "must have an image_url with a data URL")
    return url
