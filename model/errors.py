"""The errors that `model` raises. Each message says what is wrong, and how to correct it where that is known."""


class ModelError(Exception):
    """Base class of all errors that `model` raises."""


class DataError(ModelError):
    """Pictures, settings or results that cannot be used for training or measuring."""


class BundleError(ModelError):
    """A bundle, checkpoint or golden file that is incomplete, malformed or refused."""


class DeviceError(ModelError):
    """A device or precision that does not exist, or is not available here."""


class ParameterError(ModelError, ValueError):
    """A sampling parameter that is unknown or out of range. `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
