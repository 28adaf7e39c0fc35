"""Images in, images out: every kind, any size, known pixels untouched, one seed one image."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from palette import config as configs
from palette.build import build_network, resolve_precision
from palette.data import images
from palette.pipeline import Pipeline


@pytest.fixture(scope="module")
def model() -> Pipeline:
    config = configs.Config()
    config.model.channels, config.model.channel_mults = 32, [1, 2]
    config.model.res_blocks, config.model.attention_resolutions = 1, [8]
    config.data.image_size = 16
    config.sample.steps = 3
    torch.manual_seed(0)
    network = build_network(config)
    with torch.no_grad():  # the zero-initialised output would make every sample the same
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Pipeline(network, config, device="cpu", precision="float32", digest="abc")


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture
def hole() -> np.ndarray:
    mask = np.zeros((50, 70), dtype=np.uint8)
    mask[10:30, 20:45] = 255
    return mask


@pytest.mark.parametrize("native", [False, True])
def test_known_pixels_stay_and_the_hole_changes(model, photo, hole, native):
    result = model.inpaint(photo, hole, seed=3, native=native)
    assert isinstance(result, np.ndarray)
    assert result.shape == photo.shape
    assert (result[hole == 0] == photo[hole == 0]).all()
    assert (result[hole > 0] != photo[hole > 0]).mean() > 0.5


def test_what_lies_in_the_hole_is_never_read(model, photo, hole):
    other = photo.copy()
    other[hole > 0] = 7
    assert (model.inpaint(photo, hole) == model.inpaint(other, hole)).all()


def test_every_kind_of_picture_gives_the_same_pixels(model, photo, hole, tmp_path):
    expected = model.inpaint(photo, hole, seed=5)
    picture, mask = Image.fromarray(photo), Image.fromarray(hole)
    picture.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    from_pil = model.inpaint(picture, mask, seed=5)
    from_path = model.inpaint(tmp_path / "photo.png", str(tmp_path / "mask.png"), seed=5)
    tensor = images.to_tensor(picture)
    from_tensor = model.inpaint(tensor, torch.from_numpy(hole)[None] / 255, seed=5)
    assert isinstance(from_pil, Image.Image)
    assert isinstance(from_path, Image.Image)
    assert (np.asarray(from_pil) == expected).all()
    assert (np.asarray(from_path) == expected).all()
    assert torch.equal(from_tensor, images.to_tensor(Image.fromarray(expected)))


def test_known_values_of_a_tensor_are_not_rounded(model, hole):
    tensor = torch.rand(3, 50, 70) * 2 - 1
    result = model.inpaint(tensor, hole)
    known = torch.from_numpy(hole == 0).expand(3, -1, -1)
    assert torch.equal(result[known], tensor[known])


def test_a_list_gives_the_images_that_come_alone(model, photo, hole):
    flipped = np.ascontiguousarray(photo[::-1])
    both = model.inpaint([photo, flipped], hole, seed=10)
    assert (both[0] == model.inpaint(photo, hole, seed=10)).all()
    assert (both[1] == model.inpaint(flipped, hole, seed=11)).all()
    assert (both[0] != model.inpaint(photo, hole, seed=12)).any()


def test_complete_is_the_same_alone_and_in_a_batch(model):
    known = torch.rand(3, 3, 16, 16) * 2 - 1
    mask = torch.zeros(3, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    seeds = torch.tensor([4, 9, 2])
    batch = model.complete(known, mask, seeds)
    # The first step turns the network's rounding into an estimate sqrt(1/gamma - 1) times as large.
    rounding = 8 * torch.finfo(torch.float32).eps * model.schedule.range[0] ** -0.5
    for i in range(3):
        alone = model.complete(known[i : i + 1], mask[i : i + 1], seeds[i : i + 1])
        assert (alone[0] - batch[i]).abs().max() < rounding
    assert torch.equal(batch * (1 - mask), known * (1 - mask))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((50, 70), np.uint8), "no hole"),
        (np.full((50, 71), 255, np.uint8), "71x50 is not the image's 70x50"),
        ([np.full((50, 70), 255, np.uint8)] * 2, "2 masks for 1 images"),
    ],
)
def test_a_wrong_mask_is_refused_in_one_line(model, photo, mask, message):
    with pytest.raises(ValueError, match=message) as caught:
        model.inpaint(photo, mask)
    assert "\n" not in str(caught.value)


def test_precision_follows_the_processor():
    chosen = resolve_precision("auto", torch.device("cpu"))
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert chosen is (torch.bfloat16 if fast else torch.float32)
    assert resolve_precision("float32", torch.device("cpu")) is torch.float32


def test_uncrop_keeps_the_values_of_every_kind(model, photo):
    box = (-9, 4, 60, 58)
    expected = model.uncrop(photo, rectangle=box, seed=2)
    assert expected.shape == (54, 69, 3)
    assert (expected[:46, 9:] == photo[4:50, :60]).all()
    tensor = torch.rand(3, 50, 70) * 2 - 1
    wider = model.uncrop(tensor, rectangle=box)
    assert torch.equal(wider[:, :46, 9:], tensor[:, 4:50, :60])
    several = model.uncrop([Image.fromarray(photo), Image.fromarray(photo)], "left", by=0.1)
    assert [each.size for each in several] == [(77, 50)] * 2
    assert (np.asarray(model.uncrop(photo, mask="left", seed=1))[:, 35:] == photo[:, 35:]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rectangle": (5, 5, 20, 20)}, "does not go beyond"),
        ({"rectangle": (90, 5, 120, 20)}, "shows nothing of the picture of 70x50"),
        ({"side": "left", "mask": "left"}, "give one of them"),
        ({"by": 0.5, "mask": "left"}, "beyond a side, not beyond"),
        ({"native": True, "tiled": True}, "native and tiled: give one"),
    ],
)
def test_uncropping_that_makes_no_sense(model, photo, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.uncrop(photo, **arguments)


def test_panorama(model, photo):
    wide = model.panorama(photo, 160, seed=4, steps=1)
    assert wide.shape == (50, 160, 3)
    assert (wide[:, 45:115] == photo).all()
    assert (wide == model.panorama(photo, 160, seed=4, steps=1)).all()
    assert (wide != model.panorama(photo, 160, seed=5, steps=1)).any()
    with pytest.raises(ValueError, match="width: found 70; the picture has 70"):
        model.panorama(photo, 70)


def test_one_tile_changes_nothing(model):
    small = np.random.default_rng(1).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    assert (model.inpaint(small, "center", tiled=True) == model.inpaint(small, "center")).all()


@pytest.mark.parametrize("tiled", [False, True])
def test_reusing_deep_features(model, photo, hole, tiled, monkeypatch):
    def fill(**options):
        return model.inpaint(photo, hole, seed=3, tiled=tiled, **options)

    every, some = fill(), fill(reuse=2)
    assert (every != some).any()
    assert (every == fill(reuse=1)).all()
    monkeypatch.setattr(model.config.sample, "reuse", 2)
    assert (fill() == some).all()
    assert model.record(3)["reuse"] == 2
    assert "reuse" not in model.record(3, reuse=1)
    assert model.sampler().reuse == 2


def test_a_network_without_deep_features_says_so(photo, hole):
    sections = "model: {kind: sr3, channels: 32, channel_mults: [1], attention_resolutions: []}"
    config = configs.from_yaml(f"{sections}\ndata: {{image_size: 16}}")
    model = Pipeline(build_network(config), config, device="cpu")
    for options in ({"reuse": 2}, {"reuse": 2, "tiled": True}):
        with pytest.raises(ValueError, match="reuse: found 2; a model of kind sr3 has to have 1"):
            model.inpaint(photo, hole, **options)
    with pytest.raises(configs.ConfigError, match=r"sample.reuse must be 1 with model.kind=sr3"):
        configs.from_yaml(f"{sections}\nsample: {{reuse: 3}}")


def test_weights_that_change_are_followed(model):
    known, mask = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    own = Pipeline(copy.deepcopy(model.network), model.config, device="cpu", precision="float32")
    before = own.complete(known, mask, torch.tensor([1]))
    assert torch.equal(before, model.complete(known, mask, torch.tensor([1])))
    with torch.no_grad():
        for parameter in own.network.parameters():
            parameter.mul_(0.9)
    fresh = Pipeline(copy.deepcopy(own.network), model.config, device="cpu", precision="float32")
    after = own.complete(known, mask, torch.tensor([1]))
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh.complete(known, mask, torch.tensor([1])))


def test_samplers_of_a_sweep_are_not_all_kept(model):
    kept = model.sampler(2, "ddim", 0.0)
    assert model.sampler(2, "ddim", 0.0) is kept
    for number in range(20):
        model.sampler(2, "ddim", number / 20)
    assert len(model._samplers) <= 4


def test_the_configs_eta_is_that_of_ddim(model):
    config = copy.deepcopy(model.config)
    config.sample.solver, config.sample.eta = "ddim", 0.5
    own = Pipeline(copy.deepcopy(model.network), config, device="cpu", precision="float32")
    assert own.record(1)["eta"] == 0.5
    assert "eta" not in own.record(1, solver="unipc")
    own.sampler(solver="unipc")
    with pytest.raises(ValueError, match=r"eta is 0\.3"):
        own.sampler(solver="unipc", eta=0.3)


def test_a_record_says_what_changes_the_picture(model):
    assert model.record(1, native=True)["native"] is True
    assert model.record(1, tiled=True)["tiled"] is True
    assert model.record(1).keys() == {"model", "weights", "seed", "steps", "solver"}


def test_guidance_without_a_label_is_refused(model, photo, hole):
    for options in ({"guidance": 3.0}, {"guidance": 1.0, "tiled": True}):
        with pytest.raises(ValueError, match=r"guidance: found .*; it is the weight of a label"):
            model.inpaint(photo, hole, **options)


def test_float16_on_a_cpu(model, photo, hole):
    own = Pipeline(copy.deepcopy(model.network), model.config, device="cpu", precision="float16")
    assert own.inpaint(photo, hole).shape == photo.shape
