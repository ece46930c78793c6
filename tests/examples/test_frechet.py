"""The Fréchet distance of the examples: right where it is known, and larger the more videos are spoiled."""

from __future__ import annotations

import pytest
import torch

from examples.study.frechet import SPOILERS, FeatureNet, distance, moments, train_features
from examples.study.videos import Data

SIZE, REAL = (8, 16, 16), 256


def test_of_known_normal_distributions() -> None:
    a = torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 4.0]).double())
    b = torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([9.0, 4.0]).double())
    assert distance(a, a) == pytest.approx(0, abs=1e-12)
    assert distance(a, b) == pytest.approx(9 + (1 - 3) ** 2)  # commuting covariances: squared difference of the roots
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double())[0]
    turned = [(turn @ mean, turn @ cov @ turn.T) for mean, cov in (a, b)]
    assert distance(*turned) == pytest.approx(13)


def test_good_samples_are_nearer_than_bad_ones() -> None:
    data = Data(SIZE, 32, torch.device("cpu"))
    net = train_features(data, steps=300)
    reference = moments(net, data.videos(REAL // data.batch, seed=0))
    unseen = distance(moments(net, data.videos(REAL // data.batch, seed=1)), reference)
    for name, spoil in SPOILERS.items():
        slightly, badly = (
            distance(
                moments(net, (spoil(v, torch.tensor(amount)) for v in data.videos(REAL // data.batch, seed=1))),
                reference,
            )
            for amount in (0.4, 1.0)
        )
        assert badly > slightly > unseen, (name, unseen, slightly, badly)
        assert badly > 3 * unseen, (name, unseen, badly)


def test_too_few_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="4 videos; accepted: more than 32"):
        moments(FeatureNet(), [torch.zeros(4, 3, *SIZE)])
