"""Corruptions and system noise, each against a formula or another program that computes it."""

import colorsys
import io
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import qtk
from qtk.discover import available, load
from qtk.robust import corruptions
from qtk.robust.corrupt import names
from qtk.robust.system import STAGES, colour, decode, preprocessing, resize

Image = pytest.importorskip("PIL.Image")
NORMALIZE = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur")


def corrupted(name, image, severity=3, seed=0):
    pytest.importorskip("imagecorruptions")
    return load("robust.corrupt", names()[name]).corrupt(name, image, severity, seed)


def grey(value, side=96):
    return np.full((side, side, 3), value, np.uint8)


def photograph(side=96):
    """Waves of many lengths, in colours."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (k * x + (k + 1) * y)) / k for k in (1, 3, 7, 19)]
    planes = [sum(waves[i % 4 :]) + 0.3 * waves[i % 2] for i in range(3)]
    stacked = np.stack(planes, -1)
    low, high = stacked.min(), stacked.max()
    return np.rint(20 + 200 * (stacked - low) / (high - low)).astype(np.uint8)


def roughness(image):
    return np.abs(np.diff(image.astype(float), axis=0)).mean()


@pytest.mark.parametrize("name", names())
def test_a_corruption_keeps_shape_and_dtype_changes_the_image_and_repeats_itself(name):
    image = photograph()
    state = np.random.get_state()[1].copy()
    once, again = (corrupted(name, image.copy(), seed=3) for _ in range(2))
    assert once.shape == image.shape and once.dtype == np.uint8
    assert (once != image).any() and (once == again).all()
    assert (np.random.get_state()[1] == state).all()  # nobody else's random numbers are used up


@pytest.mark.parametrize("name, deviation", [
    # standard deviations at severity 3, from the benchmark's constants, of a grey of 1/2
    ("gaussian_noise", 0.18), ("shot_noise", (0.5 / 12) ** 0.5), ("speckle_noise", 0.35 * 0.5),
])  # fmt: skip
def test_noise_has_the_spread_of_its_formula(name, deviation):
    pixels = corrupted(name, grey(128)) / 255
    inside = (pixels > 0) & (pixels < 1)  # clipped values lie at the ends
    assert inside.mean() > 0.97
    assert pixels.mean() == pytest.approx(128 / 255, abs=4 * deviation / pixels.size**0.5 + 2 / 255)
    assert pixels.std() == pytest.approx(deviation, rel=0.05)


def test_impulses_take_their_share_of_the_pixels():
    pixels = corrupted("impulse_noise", grey(128))
    hit = (pixels != 128).mean()
    spread = (0.09 * 0.91 / pixels.size) ** 0.5
    assert abs(hit - 0.09) < 4 * spread and set(np.unique(pixels)) == {0, 128, 255}


@pytest.mark.parametrize("name", BLURS)
def test_a_blur_takes_the_details_and_leaves_what_has_none(name):
    image = photograph()
    assert roughness(corrupted(name, image)) < 0.9 * roughness(image)
    plain = corrupted(name, grey(100))[16:-16, 16:-16]  # away from the borders
    assert np.abs(plain.astype(int) - 100).max() <= 1


def test_a_gaussian_blur_is_scipys():
    from scipy.ndimage import gaussian_filter

    image = photograph()
    wanted = gaussian_filter(image / 255, (3, 3, 0), mode="nearest") * 255
    assert np.abs(corrupted("gaussian_blur", image) - wanted).max() <= 1.01


def test_contrast_is_a_scale_around_the_mean():
    image = photograph()
    mean = image.mean((0, 1), keepdims=True)
    wanted = ((image - mean) * 0.2 + mean).clip(0, 255)
    assert np.abs(corrupted("contrast", image) - wanted).max() <= 1.01


@pytest.mark.parametrize("name, changed", [
    ("brightness", lambda h, s, v: (h, s, min(1, v + 0.3))),
    ("saturate", lambda h, s, v: (h, min(1, 2 * s), v)),
])  # fmt: skip
def test_brightness_and_saturation_change_their_part_of_hsv(name, changed):
    image = photograph()
    found = corrupted(name, image)
    for y, x in ((0, 0), (20, 31), (50, 9), (95, 70)):
        hsv = changed(*colorsys.rgb_to_hsv(*(image[y, x] / 255)))
        wanted = 255 * np.array(colorsys.hsv_to_rgb(*hsv))
        assert np.abs(found[y, x] - wanted).max() <= 1.01


def test_pixels_and_jpeg_are_pillows():
    image = photograph()
    small = Image.fromarray(image).resize((38, 38), Image.BOX)  # .4 of 96
    wanted = np.asarray(small.resize((96, 96), Image.NEAREST))
    found = corrupted("pixelate", image)
    assert len(np.unique(found[0, :, 0])) <= 38 and (found == wanted).mean() > 0.95
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=15)
    assert (corrupted("jpeg_compression", image) == np.asarray(Image.open(data))).all()


@pytest.mark.parametrize("name, slope", [
    # of severity 3, as the benchmark has them; snow: .7 x + .3 (1.5 x + .5), where that is lighter
    ("fog", 1 / (1 + 2.5)), ("frost", 0.7), ("snow", 1.15), ("spatter", 1.0),
])  # fmt: skip
def test_weather_adds_the_same_to_every_grey(name, slope):
    dark, light = grey(40), grey(70)
    for image in (dark, light):
        image[0, 0] = 255  # fog looks for the lightest pixel
    first, second = (corrupted(name, image)[1:].astype(int) for image in (dark, light))
    unclipped = second < 255
    assert unclipped.mean() > 0.3
    assert np.abs(second - first - 30 * slope)[unclipped].max() <= 1.01  # each is cut to bytes


def test_a_defocused_image_is_its_convolution_with_a_disk():
    from scipy.ndimage import convolve, gaussian_filter

    y, x = np.mgrid[-8:9, -8:9]
    disk = (x**2 + y**2 <= 6**2).astype(float)
    disk = gaussian_filter(disk / disk.sum(), 0.5, radius=1)
    image = photograph()
    wanted = np.stack([convolve(image[..., c] / 255, disk, mode="mirror") for c in range(3)], -1)
    assert np.abs(corrupted("defocus_blur", image) - 255 * wanted).max() <= 1.01


def test_a_point_in_motion_is_a_line():
    image = grey(0)
    image[47:49, 47:49] = 255
    moved = corrupted("motion_blur", image)[..., 0].astype(float)
    along = np.cov(np.argwhere(moved > 0).T, aweights=moved[moved > 0])
    (across, length), vectors = np.linalg.eigh(along)
    assert length > 10 * across
    slope = np.degrees(np.arctan(vectors[0, 1] / vectors[1, 1]))
    assert abs(slope) < 46  # drawn between -45 and 45


def test_a_zoomed_ramp_is_flatter_by_the_mean_of_the_zooms():
    image = np.broadcast_to((32 + 2 * np.arange(96))[None, :, None], (96, 96, 3)).astype(np.uint8)
    row = corrupted("zoom_blur", image)[48, 16:-16, 0].astype(float)
    factors = np.arange(1, 1.21, 0.02)
    wanted = 2 * (1 + (1 / factors).sum()) / (len(factors) + 1)
    assert np.polyfit(np.arange(len(row)), row, 1)[0] == pytest.approx(wanted, rel=0.02)


def test_glass_moves_pixels_about_and_no_colour_is_lost():
    image = photograph()
    shaken = corrupted("glass_blur", image)
    assert np.abs(shaken.mean((0, 1)) - image.mean((0, 1))).max() <= 1.5  # twice cut to bytes
    halves = grey(0)
    halves[:, 48:] = 200
    seen = corrupted("glass_blur", halves)[..., 0].astype(int)
    assert seen[:, :24].max() <= 1 and seen[:, 72:].min() >= 198  # far from the edge nothing moves
    assert seen[:, 40:56].std(0).max() > 10  # and at the edge rows differ


def test_elastic_moves_a_pixel_by_no_more_than_its_amplitude():
    image = np.broadcast_to((32 + 2 * np.arange(96))[None, :, None], (96, 96, 3)).astype(np.uint8)
    shift = (corrupted("elastic_transform", image).astype(float) - image) / 2
    assert 0.1 < np.abs(shift).max() <= 250 * 0.085 * 0.005 * 96 + 0.5


def test_elastic_and_spatter_spare_what_they_must():
    assert np.abs(corrupted("elastic_transform", grey(90)).astype(int) - 90).max() <= 1
    spattered = corrupted("spatter", grey(90)).astype(int)
    share = (np.abs(spattered - 90).max(-1) > 3).mean()
    assert 0.01 < share < 0.7  # drops, and dry places between them


def test_small_images_are_enlarged_and_averaged_back(pair):
    pixels = pair[3][:4]
    assert (
        corruptions.factor_of(pixels) == 6 and corruptions.factor_of(torch.zeros(1, 3, 96, 99)) == 1
    )
    flat = torch.full((1, 3, 16, 16), 100 / 255)
    assert torch.allclose(corruptions.corrupted(flat, corruptions.RESIZED, 0, 0), flat)
    squares = (torch.rand(1, 3, 16, 16) * 255).round() / 255
    big = F.interpolate(squares, scale_factor=6, mode="nearest")
    back = corruptions._averaged((big[0].permute(1, 2, 0) * 255).round().byte().numpy(), 6)
    assert torch.allclose(torch.from_numpy(back) / 255, squares[0].permute(1, 2, 0))


def test_every_cause_of_system_noise_states_its_stage():
    for name in available("robust.system"):
        part = load("robust.system", name)
        assert part.STAGE in STAGES and len(part.VARIANTS) > 1


@pytest.mark.parametrize("mode, oracle", [
    ("pillow box", "area"), ("opencv area", "area"), ("pillow bilinear", "bilinear"),
    ("pillow bicubic", "bicubic"),
])  # fmt: skip
def test_resizers_that_average_are_pytorchs(mode, oracle):
    if mode.startswith("opencv"):
        pytest.importorskip("cv2")
    image = photograph()
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    smooth = {} if oracle == "area" else {"antialias": True, "align_corners": False}
    wanted = F.interpolate(x, (32, 32), mode=oracle, **smooth)[0].permute(1, 2, 0).clamp(0, 255)
    found = torch.from_numpy(resize.VARIANTS[mode](image, (32, 32)).copy())
    assert (found - wanted).abs().max() <= 1.01  # Pillow rounds after each axis


@pytest.mark.parametrize("mode", resize.VARIANTS)
def test_a_resizer_keeps_what_is_flat_and_gives_the_size(mode):
    if mode.startswith("opencv"):
        pytest.importorskip("cv2")
    found = resize.VARIANTS[mode](grey(77), (30, 20))
    assert found.shape == (30, 20, 3) and (found == 77).all()
    picked = resize.VARIANTS[mode](photograph(), (31, 31))
    if mode.endswith("nearest"):  # nothing new: every pixel is one of the picture's
        known = {tuple(p) for p in photograph().reshape(-1, 3)}
        assert {tuple(p) for p in picked.reshape(-1, 3)} <= known


def test_nv12_is_the_standards_matrix_and_shares_colours():
    for rgb, yuv in (((255, 255, 255), (235, 128, 128)), ((0, 0, 0), (16, 128, 128)),
                     ((255, 0, 0), (81, 90, 240)), ((0, 0, 255), (41, 240, 110))):  # fmt: skip
        image = np.full((2, 2, 3), rgb, np.uint8)
        assert colour._subsampled(image)[0, 0].tolist() == list(yuv)
        for variant in (colour.nv12, colour.nv12_integers):
            assert np.abs(variant(image).astype(int) - rgb).max() <= 3
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.abs(colour.nv12(greys).astype(int) - greys).max() <= 1
    back = np.linalg.inv(colour.FORWARD)
    assert np.abs(back - colour.BACK).max() < 1e-4
    checks = np.indices((5, 7)).sum(0)[..., None] % 2 * np.array([200, 20, 20])
    mixed = colour.nv12(checks.astype(np.uint8))  # an odd size: the last row has its own chroma
    assert mixed.shape == (5, 7, 3) and (mixed != checks).any()


def test_decoders_agree_on_what_they_decode():
    pytest.importorskip("cv2")
    data = io.BytesIO()
    Image.fromarray(photograph(32)).save(data, "JPEG", quality=90)
    first, second = (decode.VARIANTS[n](data.getvalue()).astype(int) for n in ("pillow", "opencv"))
    assert first.shape == second.shape and np.abs(first - second).mean() < 4
    data = io.BytesIO()
    Image.fromarray(photograph(32)).save(data, "PNG")
    assert (decode.by_opencv(data.getvalue()) == photograph(32)).all()  # the channels' order


def test_int8_pixels_lie_on_one_grid_of_256():
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    x = (torch.rand(4, 3, 8, 8) - mean) / std
    found = preprocessing.int8(x, mean, std)
    low, high = float((-mean / std).min()), float(((1 - mean) / std).max())
    step = (high - low) / 255
    assert (found - x).abs().max() <= step * 0.501
    assert len(found.unique()) <= 256


def run(pair, suite, data=None, **options):
    model, qmodel, second, pixels, labels = pair
    given = (pixels[:6], labels[:6]) if data is None else data
    return qtk.robustness(
        model, qmodel, given, suite, second=second, normalize=NORMALIZE, progress=False, **options
    )  # fmt: skip


def test_a_study_of_noise_has_rows_means_and_a_sheet(pair, tmp_path):
    pytest.importorskip("imagecorruptions")
    pytest.importorskip("cv2")
    suite = ["contrast", "fog", "resize", "colour", "preprocessing", "arithmetic", "grid"]
    found = run(pair, suite, severities=(1, 5), sheet=tmp_path / "sheet.png")
    kinds = [row.kind for row in found.rows]
    assert kinds.count("corruption") == 4 and kinds.count("system") == 11 + 2 + 1 + 2
    assert kinds.count("grid") == 11 * 3 and set(found.floor) >= {"corruption", "system", "grid"}
    assert found.gradients == "none" and not found.checks and "no attack" in found.conclusion
    summary = found.summary()
    clean = found.row("clean")
    own = [r for r in found.rows if r.kind == "corruption"]
    drop = np.mean([clean.accuracy_quantized - r.accuracy_quantized for r in own])
    assert summary["corruption"]["drop_quantized"] == pytest.approx(drop)
    assert summary["system: resize"]["worst_float"] >= summary["system: resize"]["drop_float"]
    assert len(found.notes) == 2 and "6 times" in found.notes[0]
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (3 * (16 + 4), 2 * (16 + 4))


def test_files_are_decoded_again_and_without_files_that_is_refused(pair):
    pytest.importorskip("cv2")
    from transformers import ViTImageProcessorPil

    pixels = pair[3][:4]
    data = []
    for image, label in zip(pixels, pair[4], strict=False):
        file = io.BytesIO()
        array = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(array).save(file, "PNG")
        data.append((file.getvalue(), int(label)))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    found = run(pair, "decode", data, tokenizer=processor)
    assert found.row("decode", "opencv").accuracy_float == found.row("clean").accuracy_float
    with pytest.raises(qtk.CalibrationError, match="give a folder"):
        run(pair, "decode")


def test_a_sheet_of_nothing_is_refused(pair, tmp_path):
    with pytest.raises(qtk.SchemeError, match="the suite has none"):
        run(pair, "colour", sheet=tmp_path / "sheet.png")


@pytest.mark.parametrize("severities", [(), (0,), (6,), (2.5,)])
def test_severities_are_checked(pair, severities):
    with pytest.raises(qtk.SchemeError, match="choose among"):
        run(pair, "fog", severities=severities)


@pytest.mark.parametrize("module, suite", [("imagecorruptions", "fog"), ("cv2", "resize")])
def test_a_missing_extra_is_named(pair, monkeypatch, module, suite):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(qtk.QtkError, match=r"qtk-torch\[robust\]"):
        run(pair, suite)
