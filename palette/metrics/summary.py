"""From what was collected to the scores, each with its name, its network and what to know of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from palette.metrics import kernel, manifold
from palette.metrics.frechet import frechet_distance
from palette.metrics.networks import Classifier, Identity, check_same
from palette.metrics.scorer import Networks, Tally
from palette.metrics.scores import Better, Score, Scores
from palette.metrics.statistics import FeatureStatistics

_WHERE = {"hole": "inside", "known": "outside"}
_PAIRED = "no truth was given to compare with, image by image"
_PLAIN = {
    "psnr": ("PSNR, mean over images [dB]", "higher"),
    "psnr_pooled": ("PSNR of the mean squared error [dB]", "higher"),
    "ssim": ("SSIM", "higher"),
    "mae": ("MAE [levels of 255]", "lower"),
    "mae_hole": ("MAE inside the mask [levels of 255]", "lower"),
    "mae_known": ("MAE outside the mask [levels of 255]", "lower"),
}


def summarise(
    tally: Tally,
    networks: Networks,
    reference: FeatureStatistics | None = None,
    *,
    protocol: Mapping[str, str | int] | None = None,
    names: Mapping[int, str] | None = None,
    inputs: Mapping[int, str] | None = None,
) -> Scores:
    """All scores that can be computed, and for the others the reason why not.

    Args:
        tally: of all processes.
        networks: what it was collected with.
        reference: statistics of real images; those of the truth where not given.
        protocol: more to say about the comparison; the counts and networks are added.
        names: image number to name.
        inputs: input number to name, where inputs have several images.

    Raises:
        ValueError: nothing was scored, or the reference is of another network.
    """
    if not tally.samples.count:
        raise ValueError("samples: no images were scored")
    summary = _Summary(tally)
    given = reference or (tally.truth if tally.truth.count else None)
    summary.distributions(given, networks.extractor.identity)
    summary.classes(networks.extractor.identity, networks.classifier)
    summary.pairs(networks.extractor.identity, networks.perceptual.identity)
    summary.diversity(networks.perceptual.identity)
    facts: dict[str, str | int] = dict(protocol or {})
    facts["samples"] = tally.samples.count
    facts["reference images"] = 0 if given is None else given.count
    facts["feature network"] = str(networks.extractor.identity)
    facts["perceptual network"] = str(networks.perceptual.identity)
    if networks.classifier is not None:
        facts["classifier"] = str(networks.classifier.identity)
    found = (summary.scores, summary.absent, facts, summary.per_image)
    return Scores(*found, names=dict(names or {}), inputs=dict(inputs or names or {}))


class _Summary:
    def __init__(self, tally: Tally) -> None:
        self.tally, self.columns = tally, tally.columns
        self.scores: dict[str, Score] = {}
        self.absent: dict[str, str] = {}
        self.per_image: dict[str, dict[int, float]] = {}

    def distributions(self, reference: FeatureStatistics | None, network: Identity) -> None:
        """FID, KID, precision and recall."""
        if reference is None:
            for key in ("fid", "kid", "precision", "recall"):
                self.absent[network.key(key)] = "no reference images were given"
            return
        check_same(network, reference.identity)
        samples = self.tally.samples
        self._fid(samples, reference, network)
        first, second = samples.kept.rows, reference.kept.rows
        if min(len(first), len(second)) < 2:
            self.absent[network.key("kid")] = "it wants two images on each side"
        else:
            found = kernel.kernel_distance(first, second)
            how = f"{network}; {found.subsets} subsets of {found.subset_size}"
            self._score("kid", "KID", found.mean, how, "lower", network, found.deviation)
        if min(len(first), len(second)) <= manifold.NEIGHBOURS:
            for key in ("precision", "recall"):
                self.absent[network.key(key)] = (
                    f"it wants more than {manifold.NEIGHBOURS} images on each side"
                )
            return
        both = manifold.precision_recall(first, second)
        how = f"{network}; k = {manifold.NEIGHBOURS}, {len(first)} and {len(second)} images"
        self._score("precision", "precision", both.precision, how, "higher", network)
        self._score("recall", "recall", both.recall, how, "higher", network)

    def _fid(
        self, samples: FeatureStatistics, reference: FeatureStatistics, network: Identity
    ) -> None:
        value = frechet_distance(samples.gaussian, reference.gaussian)
        fewest, dim = min(samples.count, reference.count), samples.gaussian.dim
        note = f"biased upwards: {fewest} images for {dim} features" if fewest <= dim else ""
        self._score("fid", "FID", value, str(network), "lower", network, note=note)

    def classes(self, network: Identity, classifier: Classifier | None) -> None:
        """IS and CA."""
        inception = self.tally.inception
        if inception is None:
            self.absent["is"] = f"the feature network knows no classes: {network}"
        else:
            found = inception.compute()
            how = f"{network}; {found.splits} splits"
            few = inception.count < 100 * found.splits
            note = f"without splits {found.whole:.6g}" + ("; too few images for it" if few else "")
            self._score(
                "is", "inception score", found.mean, how, "higher", network, found.deviation, note
            )
        if "ca" in self.columns and classifier is not None:
            mean = 100 * self.columns.mean("ca")
            how = str(classifier.identity)
            self._score("ca", "CA, top 1 [%]", mean, how, "higher", classifier.identity)
            self._keep("ca", "ca")
        else:
            what = "classifier" if classifier is None else "labels"
            self.absent["ca"] = f"no {what} given"

    def pairs(self, extractor: Identity, perceptual: Identity) -> None:
        """PD, LPIPS, PSNR, SSIM and MAE."""
        columns = self.columns
        if "psnr" not in columns:
            for key in (extractor.key("pd"), perceptual.key("lpips"), "psnr", "ssim", "mae"):
                self.absent[key] = _PAIRED
            return
        distances = columns.column("pd").values()
        squared = math.fsum(value * value for value in distances) / len(distances)
        title, how = "PD, mean distance of features", str(extractor)
        self._mean("pd", title, how, "lower", extractor)
        self._score("pd_squared", "PD, mean squared distance", squared, how, "lower", extractor)
        self._mean("lpips", "LPIPS", str(perceptual), "lower", perceptual)
        equal = sum(math.isinf(value) for value in columns.column("psnr").values())
        self._mean("psnr", *_plain("psnr"), note=f"{equal} images are equal" if equal else "")
        pooled = columns.sum("squared") / columns.sum("values")
        value = math.inf if pooled == 0 else 10 * math.log10(255**2 / pooled)
        self._score("psnr_pooled", *_titled("psnr_pooled", value))
        if "ssim" in columns:
            self._mean("ssim", *_plain("ssim"), note=self.tally.reasons.get("ssim", ""))
        else:
            self.absent["ssim"] = self.tally.reasons["ssim"]
        self._errors()

    def _errors(self) -> None:
        """MAE over all values of all images: an image with a larger hole weighs more there."""
        columns = self.columns
        mean = columns.sum("absolute") / columns.sum("values")
        self._score("mae", *_titled("mae", mean), spread=columns.deviation("mae"))
        self._keep("mae", "mae")
        for part in ("hole", "known"):
            key = f"mae_{part}"
            if f"values_{part}" not in columns:
                self.absent[key] = "no masks were given"
            elif not columns.sum(f"values_{part}"):
                self.absent[key] = f"the masks leave no pixel {_WHERE[part]}"
            else:
                found = columns.sum(f"absolute_{part}") / columns.sum(f"values_{part}")
                self._score(key, *_titled(key, found), images=columns.count(f"values_{part}"))

    def diversity(self, perceptual: Identity) -> None:
        """MS-SSIM of the first sample with the others; LPIPS of consecutive samples."""
        key, title = "diversity_ms_ssim", "diversity: MS-SSIM of first and other samples"
        note = self.tally.reasons.get(key, "")
        if key in self.columns:
            scales = sorted(set(self.columns.column("scales").values()))
            how = f"MS-SSIM, {' and '.join(str(int(count)) for count in scales)} scales"
            self._mean(key, title, how, "lower", note=note)
        else:
            self.absent[key] = note or "it wants two samples of an input"
        key, title = "diversity_lpips", "diversity: LPIPS of consecutive samples"
        if key in self.columns:
            self._mean(key, title, str(perceptual), "higher", perceptual)
        else:
            self.absent[perceptual.key(key)] = "it wants two samples of an input"

    def _mean(
        self,
        column: str,
        title: str,
        uses: str,
        better: Better,
        network: Identity | None = None,
        note: str = "",
    ) -> None:
        value, spread = self.columns.mean(column), self.columns.deviation(column)
        images = self.columns.count(column)
        self._score(column, title, value, uses, better, network, spread, note, images)
        self._keep(column, column if network is None else network.key(column))

    def _keep(self, column: str, key: str) -> None:
        self.per_image[key] = self.columns.column(column)

    def _score(
        self,
        key: str,
        title: str,
        value: float,
        uses: str,
        better: Better,
        network: Identity | None = None,
        spread: float | None = None,
        note: str = "",
        images: int | None = None,
    ) -> None:
        """Note a score; that of a stand-in network gets a name that nobody can mistake."""
        if network is not None and network.stand_in:
            key, title = network.key(key), f"{title} (random network)"
        count = self.tally.samples.count if images is None else images
        self.scores[key] = Score(key, title, value, count, uses, better, spread, note)


def _plain(key: str) -> tuple[str, str, Better]:
    title, better = _PLAIN[key]
    uses = "Gaussian window of 11 pixels, mean of the channels" if key == "ssim" else ""
    return title, uses, "higher" if better == "higher" else "lower"


def _titled(key: str, value: float) -> tuple[str, float, str, Better]:
    title, uses, better = _plain(key)
    return title, value, uses, better
