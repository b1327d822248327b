"""Tiles: rules, tables, and sums split among programs."""

import json

import pytest
import torch

from qtk_kernels import _launch, _plan
from qtk_kernels._launch import gemm_launch, nearest, packed_steps, steps_of
from qtk_kernels.codes import Codes, channels_of
from qtk_kernels.hadamard_quantize import hadamard_launch
from qtk_kernels.int4_linear import int4_linear
from qtk_kernels.int8_linear import int8_linear
from qtk_kernels.packing import pack_int4
from qtk_kernels.weight_only_linear import weight_only_linear

H100 = _launch.Card("NVIDIA H100", (9, 0), 132)
TILE = {"BLOCK_M": 16, "BLOCK_N": 128, "GROUP_M": 1, "SWAP": True, "SPLIT_K": 2,
        "num_warps": 4, "num_stages": 3}  # fmt: skip
RULE = {"grouped": False, "computed_weights": True, "weight_bits": 4}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table for an H100."""
    entries = [
        {"kernel": "int8_linear", "M": M, "N": 4096, "K": 4096, "us": 1.0,
         "tile": {**TILE, "GROUP_M": M}}
        for M in (1, 64)
    ]  # fmt: skip
    _launch.table_path(H100, tmp_path).write_text(json.dumps({"entries": entries}))
    monkeypatch.setattr(_launch, "TUNED", tmp_path)
    _plan.forget()


def test_the_nearest_measured_shape_counts(table):
    assert nearest("int8_linear", 1, 4096, 4096, H100)["GROUP_M"] == 1
    assert nearest("int8_linear", 50, 5120, 4096, H100)["GROUP_M"] == 64


def test_far_shapes_other_kernels_and_other_devices_have_no_entry(table):
    assert nearest("int8_linear", 8, 512, 512, H100) is None
    assert nearest("int4_linear W4A8", 1, 4096, 4096, H100) is None
    assert nearest("int8_linear", 1, 4096, 4096, H100._replace(capability=(8, 0))) is None


def test_a_card_without_a_table_follows_its_kin_and_says_so_once(table, caplog):
    h20 = _launch.Card("NVIDIA H20", (9, 0), 78)
    for M in (1, 50):
        assert nearest("int8_linear", M, 4096, 4096, h20) == nearest(
            "int8_linear", M, 4096, 4096, H100
        )
    assert len(caplog.messages) == 1 and "measured on NVIDIA H20" in caplog.messages[0]
    assert "sm_90_132_nvidia_h100" in caplog.messages[0]


def test_no_table_is_shipped_that_nobody_measured():
    for path in _launch.TUNED.glob("*.json"):
        table = _launch.read_table(path)
        assert table["entries"] and table["device"] and table["versions"]


@pytest.mark.parametrize("change", [
    {"tile": {**TILE, "BLOCK_M": 17}}, {"tile": {"BLOCK_M": 16}},
    {"tile": {**TILE, "num_warps": 3}}, {"tile": {**TILE, "POWER": 1}}, {"M": 0}, {"M": "1"},
    {"us": 0}, {"us": None}, {"K": None},
], ids=str)  # fmt: skip
def test_a_table_that_no_kernel_can_follow_is_refused(tmp_path, change):
    entry = {"kernel": "int8_linear", "M": 1, "N": 64, "K": 64, "us": 1.0, "tile": TILE}
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"entries": [entry]}))
    assert _launch.read_table(path)["entries"] == [entry]
    path.write_text(json.dumps({"entries": [{**entry, **change}]}))
    with pytest.raises(ValueError, match=r"sm_90\.json is no table of tiles .* `qtk tune`"):
        _launch.read_table(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"entries": [{}]}'])
def test_half_a_file_is_refused(tmp_path, text):
    (tmp_path / "sm_90.json").write_text(text)
    with pytest.raises(ValueError, match="is no table of tiles"):
        _launch.read_table(tmp_path / "sm_90.json")


def test_a_gpu_follows_its_table(table, monkeypatch):
    monkeypatch.setattr(_launch, "card_of", lambda device: H100)
    gpu, rule = torch.device("cuda", 0), {"grouped": False, "computed_weights": False}
    assert gemm_launch("int8_linear", 60, 4096, 4096, device=gpu, **rule)["GROUP_M"] == 64
    far = gemm_launch("int8_linear", 1, 256, 256, device=gpu, **rule)
    assert far == gemm_launch("int8_linear", 1, 256, 256, **rule)


@pytest.mark.parametrize("M", [1, 16, 64, 65, 4096])
def test_splits_fill_the_device_and_leave_work_for_each(M):
    tile = gemm_launch("int4_linear W4A8", M, 4096, 4096, **RULE)
    split = tile["SPLIT_K"]
    assert split * 512 <= 4096 and split & (split - 1) == 0
    assert split > 1 if M == 1 else split == 1 if M > 64 else True


@pytest.mark.parametrize("M, N, K, split", [
    (128, 768, 3072, 4), (197, 768, 768, 1), (197, 768, 3072, 2), (128, 1024, 4096, 4),
    (128, 3072, 768, 1), (512, 768, 3072, 1), (65, 16, 65536, 16),
])  # fmt: skip
def test_a_product_with_fewer_tiles_than_processors_is_split(M, N, K, split):
    """BERT's and ViT's at batch 1: 24 programs would leave 108 of 132 processors idle."""
    tile = gemm_launch("int8_linear", M, N, K, grouped=False, computed_weights=False)
    assert tile["SPLIT_K"] == split
    tiles = -(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"])
    assert split == 1 or tiles * split <= _launch.SMS


def test_many_tokens_in_parts_give_the_same_bits():
    """By the rule, not by a tile of the test's own."""
    M, N, K = 70, 20, 1100
    x_q, w_q = (torch.randint(-128, 128, (n, K), dtype=torch.int8) for n in (M, N))
    args = {"x_scale": torch.rand(M, 1), "x_zero_point": 3}
    w_scale, bias = torch.rand(N, 1), torch.randn(N)
    tile = gemm_launch("int8_linear", M, N, K, grouped=False, computed_weights=False)
    assert tile["SPLIT_K"] == 2
    want = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    assert torch.equal(int8_linear(x_q, w_q, w_scale, bias, **args, backend="triton"), want)


def test_steps_cover_k_once():
    assert steps_of(300, 0, 128) == 3
    assert steps_of(300, 64, 64) == 5
    assert steps_of(300, 100, 64) == 6  # two for each group
    assert packed_steps(300, 300, 192) == (64, 3)
    assert packed_steps(300, 20, 192) == (64, 5 * 5)


@pytest.fixture
def split_in_three(monkeypatch):
    monkeypatch.setattr(_launch, "_splits", lambda *_: 3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_split_integer_sums_give_the_same_bits(split_in_three, dynamic):
    M, N, K = 5, 300, 900
    x_q = torch.randint(-8, 8, (M, K), dtype=torch.int8)
    w_q = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    w_scale, bias = torch.rand(N, 1) * 1e-2, torch.randn(N)
    args = {"x_scale": torch.rand(M, 1) if dynamic else None, "x_zero_point": 3,
            "out_codes": Codes(8), "out_step": 0.1, "out_zero_point": -2}  # fmt: skip
    want = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    assert torch.equal(int8_linear(x_q, w_q, w_scale, bias, **args, backend="triton"), want)
    packed = pack_int4(w_q)
    for x, x_packed in ((x_q, False), (pack_int4(x_q), True)):
        y = int4_linear(
            x, packed, w_scale, bias, in_features=K, x_packed=x_packed, **args, backend="triton"
        )
        assert torch.equal(y, want)


@pytest.mark.parametrize("group_size", [None, 50, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_split_float_sums_are_close_and_do_not_change(split_in_three, group_size, bits):
    M, N, K = 3, 40, 700
    w_q = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    G = -(-K // group_size) if group_size else 1
    w_scale, x = torch.rand(N, G), torch.randn(M, K)
    args = {"bits": bits, "in_features": K, "group_size": group_size}
    w = pack_int4(w_q) if bits == 4 else w_q
    want = weight_only_linear(x, w, w_scale, **args, backend="reference")
    got = [weight_only_linear(x, w, w_scale, **args, backend="triton") for _ in range(2)]
    assert torch.equal(*got)
    magnitude = x.abs() @ (w_q.abs() * w_scale.amax(1, keepdim=True)).T
    assert ((got[0] - want).abs() <= 2 * (K + 8) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("K", [1, 100, 384, 768, 1000, 2560, 5120, 7168, 8192])
@pytest.mark.parametrize(
    "codes", [Codes(8), Codes(4, "token", packed=True), Codes(8, 100)], ids=str
)
def test_parts_hold_a_row(codes, K):
    tile = codes.launch(4096, K)
    lanes = tile["PART"] * tile["PARTS"]
    walked = codes.granularity == 100 and K > 5120  # 128 lanes a group are more than 8192
    assert walked == (channels_of(tile) < K)
    assert lanes <= 8192 and tile["ROWS"] * tile["PART"] >= 128
    assert tile["FULL"] <= (tile["PART"] * tile["PARTS"] == K)


@pytest.mark.parametrize("K", [384, 768, 1024, 2560, 3072, 4096, 5120, 7168, 16384])
def test_no_lane_idles_at_the_widths_of_models(K):
    assert Codes(8).launch(4096, K)["FULL"] and Codes(8, "token").launch(4096, K)["FULL"]


def test_nothing_remembers_every_number_of_tokens():
    """Plans are bounded, and hold what was worked out for them."""
    for function in (_launch._rule, Codes.launch, hadamard_launch):
        assert not hasattr(function, "cache_info")
    assert all(cache.cache_info().maxsize == _plan.SIGNATURES for cache in _plan._caches)
