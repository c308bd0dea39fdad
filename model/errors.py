"""The errors the model side raises; each message says what to change."""


class ModelError(Exception):
    """Base of every error raised by `model`."""


class DataError(ModelError):
    """Training data that cannot be found, fetched or read."""


class BundleError(ModelError):
    """A model bundle, checkpoint or golden file that is incomplete, malformed or refused."""


class ParameterError(ModelError, ValueError):
    """A sampling or network parameter out of range; ``field`` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
