"""Several processes quantize one model together, as one process with all the data would."""

import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

import qtk
from qtk import ranks
from qtk.assembly import quantized_layers
from qtk.round._least_squares import hessian_of
from tests.zoo import build

RECIPES = {
    "min and max": {"preset": "fast"},
    "four bits": {"w": 4, "a": 4, "preset": "fast"},
    "weights alone": {"w": 4, "a": 16, "group_size": 16, "weights": "asymmetric", "preset": "fast"},
    "one rank a layer": {"w": 4, "a": 8, "rounding": "adaround"},
    "attention": {"attention": "int8", "softmax": "matthew", "preset": "fast"},
    "gradients": {"w": 4, "a": 4, "ranges": "hessian", "rounding": "nearest"},
    "block": {"w": 4, "a": 4, "rounding": "nearest", "learn": "block"},
    "no data": {"w": 4, "calib": None},
}


def batches(count: int = 5):
    drawn = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 99, (2, 4 + i), generator=drawn)} for i in range(count)]


def in_group(world: int, folder: Path, work):
    """work(rank) in so many forked processes of a gloo group; their results, None of the dead."""
    folder.mkdir(exist_ok=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            store = distributed.FileStore(str(folder / "store"), world)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
            found = work(rank)
            (folder / f"{rank}.pkl").write_bytes(pickle.dumps(found))
        except BaseException as error:
            (folder / f"{rank}.pkl").write_bytes(pickle.dumps(f"{type(error).__name__}: {error}"))
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    files = [folder / f"{rank}.pkl" for rank in range(world)]
    return [pickle.loads(f.read_bytes()) if f.exists() else None for f in files]


def quantized(**options):
    model, _ = build("BertModel")
    options = {"calib": batches(), "progress": False, **options}
    return qtk.quantize(model, **options)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(wanted, ranks):
    for state in ranks:
        assert not isinstance(state, str), state
        assert [name for name in wanted if not torch.equal(wanted[name], state[name])] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_give_what_one_process_gives(recipe, tmp_path):
    wanted = state_of(quantized(**RECIPES[recipe]))
    found = in_group(2, tmp_path, lambda rank: state_of(quantized(**RECIPES[recipe])))
    assert_same(wanted, found)


def test_gptq_by_rows_is_as_good_and_the_same_on_all_ranks(tmp_path):
    def work(_):
        model = quantized(w=4, a=8)
        record = model.config.quantization_config.record
        return state_of(model), [layer.sqnr for layer in record.layers.values()]

    _, alone = work(0)
    (first, together), (second, _) = in_group(2, tmp_path, work)
    assert_same(first, [second])
    # a code that lies between two may fall to the other, and what is learned from it follows
    assert abs(sum(alone) - sum(together)) / len(alone) < 1


def test_three_ranks_and_fewer_batches_than_ranks(tmp_path):
    for count in (5, 2, 1):
        options = {"w": 4, "a": 8, "calib": batches(count), "preset": "fast"}
        wanted = state_of(quantized(**options))
        found = in_group(3, tmp_path / str(count), lambda _, o=options: state_of(quantized(**o)))
        assert_same(wanted, found)


def test_data_of_each_ranks_own_is_put_together(tmp_path):
    every = batches(5)
    wanted = state_of(quantized(calib=every, preset="fast"))
    parts = [every[:2], every[2:]]
    found = in_group(
        2, tmp_path, lambda rank: state_of(quantized(calib=parts[rank], preset="fast"))
    )
    assert_same(wanted, found)


def test_hessians_of_gathered_rows_are_those_of_all(tmp_path):
    rows = torch.randn(64, 16)

    def work(rank):
        parts = ranks.together(lambda: rows.tensor_split(2)[rank])
        return hessian_of(torch.cat(parts))

    for hessian in in_group(2, tmp_path, work):
        assert torch.allclose(hessian, hessian_of(rows), rtol=1e-6, atol=0)


def test_the_batches_are_shared_out(tmp_path, monkeypatch):
    seen = []
    walk = sys.modules["qtk.observe.walk"]
    forward = walk.forward
    monkeypatch.setattr(walk, "forward", lambda *a, **k: (seen.append(a[2]), forward(*a, **k))[1])

    def work(rank):
        quantized()
        return list(seen)

    assert in_group(2, tmp_path, work) == [[0, 2, 4], [1, 3]]


def test_a_rank_that_dies_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    quantize_site, done = qtk.pipeline.quantize_site, []

    def dies(*args):
        done.append(args)
        if len(done) == 3 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return quantize_site(*args)

    monkeypatch.setattr(qtk.pipeline, "quantize_site", dies)
    left, dead = in_group(2, tmp_path, lambda rank: state_of(quantized()))
    assert dead is None and "BackendError: rank 0 of 2 waits for one that has ended" in left


def test_an_error_of_one_rank_is_that_of_all(tmp_path):
    def work(rank):
        if rank == 1:
            ranks.together(lambda: 1 / 0)
        return ranks.together(lambda: 1)

    assert in_group(2, tmp_path, work) == ["ZeroDivisionError: division by zero"] * 2


def test_one_process_sends_nothing():
    assert ranks.world() == 1 and ranks.rank() == 0
    assert ranks.spread(lambda x: 2 * x, [1, 2]) == [2, 4] and ranks.together(lambda: 3) == [3]
    assert ranks.least([3, 1, 2, 1], float) == 1 and quantized_layers(quantized())
    assert "torch.distributed" in sys.modules
