"""Settings that name a real object store."""

from __future__ import annotations

import pytest

from patchforge.service.settings import Settings


@pytest.fixture
def stored_apart(settings: Settings, object_variables: dict[str, str]) -> Settings:
    """Settings with which pictures go into the object store."""
    return settings.model_copy(update={"results": object_variables["PATCHFORGE_RESULTS"]})
