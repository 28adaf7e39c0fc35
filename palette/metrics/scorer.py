"""Collects everything that the scores need while samples come by; merges over processes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from palette.metrics import pixels, structural
from palette.metrics.inception_score import InceptionScore, hits
from palette.metrics.kept import KEPT
from palette.metrics.networks import (
    Classifier,
    Extractor,
    Features,
    Identity,
    PairNetwork,
    check_same,
)
from palette.metrics.per_image import PerImage
from palette.metrics.pictures import check_pairs, check_pictures
from palette.metrics.random_network import RandomDistance, RandomNetwork
from palette.metrics.statistics import FeatureStatistics, Gather


class Networks:
    """The feature networks of an evaluation.

    Args:
        extractor: for FID, KID, IS, PD, precision and recall; the built-in one where not given.
        perceptual: for LPIPS; the built-in one where not given.
        classifier: for CA; without one there is no CA.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        perceptual: PairNetwork | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        self.extractor: Extractor = extractor or RandomNetwork()
        self.perceptual: PairNetwork = perceptual or RandomDistance()
        self.classifier = classifier

    def features(self, pictures: Tensor, *, classify: bool = False) -> Features:
        """Of uint8 [N, 3, H, W]. Raises ValueError when they are not finite."""
        found = self.extractor(pictures, classify=classify)
        if not bool(torch.isfinite(found.values).all()):
            raise ValueError(f"{self.extractor.identity}: features that are not finite")
        return found

    def statistics(self, keep: int = KEPT) -> FeatureStatistics:
        """Empty statistics of the extractor."""
        return FeatureStatistics(self.extractor.identity, self.extractor.dim, keep)

    def identities(self) -> list[Identity]:
        """Of all of them."""
        given = (self.extractor, self.perceptual, self.classifier)
        return [network.identity for network in given if network is not None]


class Tally:
    """Sums, features and numbers of single images: what is left of an evaluation's pictures.

    Plain data, without networks: it can be pickled and sent to other processes. Image numbers are
    global and given by the caller; an image that is added twice is refused.
    """

    def __init__(self, networks: Networks, *, keep: int = KEPT) -> None:
        self.keep = keep
        self.identities = networks.identities()
        self.samples = networks.statistics(keep)
        self.truth = networks.statistics(keep)
        classes = networks.extractor.classes
        self.inception = None if classes is None else InceptionScore(classes)
        self.columns = PerImage()
        self.reasons: dict[str, str] = {}
        """Why a metric is missing or incomplete, where pictures decided that."""

    def merge(self, other: Tally) -> None:
        """Add what ``other`` has seen.

        Raises ValueError for other networks, or an image that both have seen.
        """
        for mine, theirs in itertools.zip_longest(self.identities, other.identities):
            check_same(mine, theirs, "scores")
        self.samples.merge(other.samples)
        self.truth.merge(other.truth)
        if self.inception is not None and other.inception is not None:
            self.inception.merge(other.inception)
        self.columns.merge(other.columns)
        self.reasons.update(other.reasons)


class Scorer:
    """Scores pictures batch by batch, in bounded memory, on one process or many.

    Every process scores some of the images (:meth:`update`), then :meth:`gathered` has all of them.
    :func:`palette.metrics.summary.summarise` makes the scores.

    Args:
        networks: the feature networks; the built-in ones where not given.
        keep: how many images' features are kept whole, for KID, precision and recall.
    """

    def __init__(self, networks: Networks | None = None, *, keep: int = KEPT) -> None:
        self.networks = networks or Networks()
        self.tally = Tally(self.networks, keep=keep)

    def update(
        self,
        samples: Tensor,
        indices: Tensor,
        *,
        truth: Tensor | None = None,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Score samples uint8 [N, 3, H, W].

        Args:
            samples: pictures; :func:`palette.metrics.pictures.to_uint8` makes them from [-1, 1].
            indices: their global numbers, int64 [N].
            truth: what they should be, the same shape.
            inputs: number int64 [N] of the input that each sample belongs to, where inputs have
                several; ``indices`` otherwise.
            mask: [N, 1, H, W], 1 = hole.
            labels: true classes int64 [N].

        Raises:
            ValueError: shapes that do not fit, an image number that came before.
        """
        check_pictures(samples, "samples")
        tally = self.tally
        found = self.networks.features(samples, classify=tally.inception is not None)
        tally.samples.update(found.values, indices)
        if tally.inception is not None and found.probabilities is not None:
            tally.inception.update(found.probabilities, indices)
        if labels is not None and self.networks.classifier is not None:
            chances = self.networks.classifier(samples)
            tally.columns.add("ca", indices, hits(chances, labels))
        if truth is not None:
            check_pairs(samples, truth)
            self._compare_pixels(samples, truth, indices, mask)
            self._compare_features(found.values, truth, indices, inputs)
            distances = self.networks.perceptual(samples, truth)
            tally.columns.add("lpips", indices, distances)

    def update_group(self, samples: Tensor, group: int) -> None:
        """Note how much the samples uint8 [K, 3, H, W] of one input differ among themselves.

        The paper's two measures: MS-SSIM of the first sample with each other one, and
        LPIPS of consecutive samples, each averaged over the pairs. One sample alone says nothing.
        """
        check_pictures(samples, "samples")
        if len(samples) < 2:
            return
        columns = self.tally.columns
        if min(samples.shape[2:]) >= structural.WINDOW:
            others = samples[1:]
            similar = structural.ms_ssim(samples[:1].expand_as(others), others)
            columns.add("diversity_ms_ssim", [group], similar.mean(0, keepdim=True))
            scales = structural.scales(samples.shape[2], samples.shape[3])
            columns.add("scales", [group], torch.tensor([float(scales)]))
        else:
            self.tally.reasons["diversity_ms_ssim"] = _TOO_SMALL
        distances = self.networks.perceptual(samples[:-1], samples[1:])
        columns.add("diversity_lpips", [group], distances.mean(0, keepdim=True))

    def gathered(self, gather: Gather) -> Tally:
        """What all processes have scored, the same on each; ``gather`` as ``World.gather``."""
        tally = self.tally
        whole = Tally(self.networks, keep=tally.keep)
        whole.samples = tally.samples.gathered(gather)
        whole.truth = tally.truth.gathered(gather)
        rest = (tally.inception, tally.columns, tally.reasons)
        for inception, columns, reasons in gather(rest):
            if whole.inception is not None:
                whole.inception.merge(inception)
            whole.columns.merge(columns)
            whole.reasons.update(reasons)
        return whole

    def _compare_pixels(
        self, samples: Tensor, truth: Tensor, indices: Tensor, mask: Tensor | None
    ) -> None:
        columns = self.tally.columns
        found = pixels.errors(samples, truth, mask)
        values = samples[0].numel()
        ratios = [pixels.psnr(squared, values) for squared in found.squared.tolist()]
        absolute = found.absolute_hole + found.absolute_known
        columns.add("psnr", indices, torch.tensor(ratios, dtype=torch.float64))
        columns.add("squared", indices, found.squared)
        columns.add("absolute", indices, absolute)
        columns.add("values", indices, torch.full_like(absolute, values))
        columns.add("mae", indices, absolute / values)
        if mask is not None:
            columns.add("absolute_hole", indices, found.absolute_hole)
            columns.add("values_hole", indices, found.values_hole)
            columns.add("absolute_known", indices, found.absolute_known)
            columns.add("values_known", indices, found.values_known)
        if min(samples.shape[2:]) >= structural.WINDOW:
            columns.add("ssim", indices, structural.ssim(samples, truth))
        else:
            self.tally.reasons["ssim"] = _TOO_SMALL

    def _compare_features(
        self, values: Tensor, truth: Tensor, indices: Tensor, inputs: Tensor | None
    ) -> None:
        """Perceptual distance; each input's truth is looked at, and counted, once."""
        numbers = (indices if inputs is None else inputs).tolist()
        places = {number: place for place, number in reversed(list(enumerate(numbers)))}
        known = self.networks.features(truth[list(places.values())]).values
        rows = {number: row for row, number in enumerate(places)}
        paired = known[[rows[number] for number in numbers]]
        distance = (values.to(torch.float64) - paired.to(torch.float64)).norm(dim=1)
        self.tally.columns.add("pd", indices, distance)
        new = [number for number in places if number not in self.tally.truth]
        if new:
            self.tally.truth.update(known[[rows[number] for number in new]], torch.tensor(new))


_TOO_SMALL = f"some images have a side below {structural.WINDOW} pixels"
