"""qtk.compile: packages of native code serve a model, which stays what it was."""

import contextlib
import copy
import inspect
import json
import logging
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

import qtk
from qtk.compiler.program import WithoutStatistics
from qtk.demo.sentences import sentences
from qtk.packages import bundle, package
from qtk.packages.package import Signature
from qtk.packages.route import Route, Timing
from qtk.packages.served import bundle_of
from tests.zoo import build

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZE = (2, 8)
CALLS: list[Any] = []  # sizes of the packages that were called
CLOSE = 0.9999  # float32 adds up in another order, and a code at a tie may move by one


def quantized(name: str = "BertModel", layers: int = 1, **options: Any) -> Any:
    model, batch = build(name, num_hidden_layers=layers)
    options = {"w": 7, "calib": [batch], "progress": False, **options}
    return qtk.quantize(model, **options), batch


def compiled(qmodel: Any, sizes: Any, **options: Any) -> Any:
    """With packages wherever one fits: which is the fastest is no matter of these tests."""
    found = qtk.compile(qmodel, sizes, tune=False, progress=False, **options)
    for route in bundle_of(found).routes.values():
        assert len(route.timings) >= 1 and all(t.eager > 0 for t in route.timings)
        route.timings = []
    CALLS.clear()  # of the timings
    return found


@pytest.fixture(scope="module")
def pair() -> Any:
    """A quantized BERT, the same with one package, and a batch of that package's size."""
    torch.manual_seed(0)
    qmodel, batch = quantized()
    return qmodel, compiled(qmodel, [SIZE], dynamic=False), batch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sizes of the packages that are called."""
    run = package.Package.__call__

    def note(self: Any, inputs: Any) -> Any:
        CALLS.append(self.size)
        return run(self, inputs)

    monkeypatch.setattr(package.Package, "__call__", note)
    CALLS.clear()
    return CALLS


@torch.no_grad()
def same(model: Any, other: Any, **batch: Any) -> bool:
    """Whether both return the same fields, of the same shapes and nearly the same numbers.

    At padding, which one of them may leave out, they need not agree.
    """
    y, y_hat = model(**batch), other(**batch)
    assert type(y) is type(y_hat) and list(y) == list(y_hat)
    pairs = [(y[name], y_hat[name]) for name in y if isinstance(y[name], torch.Tensor)]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    mask = batch.get("attention_mask")
    if mask is not None:
        seen = mask.bool()
        pairs = [(a[seen], b[seen]) if a.shape[:2] == seen.shape else (a, b) for a, b in pairs]
    return all(cosine_similarity(a.flatten(), b.flatten(), dim=0) > CLOSE for a, b in pairs)


def test_a_compiled_model_is_the_model(pair: Any, calls: list[Any]) -> None:
    qmodel, served, batch = pair
    assert type(served).__name__ == "BertModel" and isinstance(served, type(qmodel))
    assert inspect.signature(served.forward) == inspect.signature(qmodel.forward)
    assert "compiled: plain-2x8" in qtk.summary(served).table()
    assert served.encoder is qmodel.encoder and bundle_of(qmodel) is None
    assert same(qmodel, served, **batch) and calls == [SIZE]
    a, b = served(*batch.values(), return_dict=False), qmodel(**batch, return_dict=False)
    assert isinstance(a, tuple) and len(a) == len(b) and len(calls) == 2


def test_statistics_of_the_compiler_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.redirect_stderr(WithoutStatistics(sys.stderr)):
        sys.stderr.write("Autotune Choices Stats:\n{}\n")
        print("an error", file=sys.stderr)
        sys.stderr.flush()
    assert capsys.readouterr().err == "an error\n"


@pytest.mark.parametrize("rows, tokens", [(1, 8), (2, 5), (1, 1)])
def test_fewer_rows_and_tokens_are_padded(
    pair: Any, calls: list[Any], rows: int, tokens: int
) -> None:
    qmodel, served, _ = pair
    ids = torch.randint(3, 99, (rows, tokens))
    assert same(qmodel, served, input_ids=ids) and calls == [SIZE]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, tokens // 2 :] = tokens < 2
    assert same(qmodel, served, input_ids=ids, attention_mask=mask) and len(calls) == 2
    assert served(input_ids=ids)[0].is_contiguous()


def test_what_packages_cannot_give_comes_from_the_model(pair: Any, calls: list[Any]) -> None:
    qmodel, served, batch = copy.deepcopy(pair)  # transformers leaves its recorders in a model
    larger = {"input_ids": torch.randint(3, 99, (3, 9))}
    assert torch.equal(served(**larger)[0], qmodel(**larger)[0])
    assert len(served(**batch, output_hidden_states=True).hidden_states) == 2
    vectors = qmodel.embeddings.word_embeddings(batch["input_ids"]).detach().requires_grad_()
    served(inputs_embeds=vectors)[0].sum().backward()
    assert vectors.grad is not None and vectors.grad.abs().max() > 0
    heard: list[Any] = []
    handle = served.encoder.register_forward_hook(lambda *args: heard.append(args))
    served(**batch)
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        served(**batch)
    positions = torch.arange(8).expand(2, -1)
    assert torch.equal(served(**batch, position_ids=positions)[0], qmodel(**batch)[0])
    assert len(heard) == 1 and not calls
    served(**batch)
    assert calls == [SIZE]


def test_a_copy_and_a_moved_model(
    pair: Any, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    qmodel, served, batch = pair
    y = served(**batch)[0]
    for other in (copy.deepcopy(served), pickle.loads(pickle.dumps(served)), served.to("cpu")):
        assert torch.equal(other(**batch)[0], y)
    assert calls == [SIZE] * 4
    moved = copy.deepcopy(served).to(torch.bfloat16)
    assert moved(**batch)[0].dtype == torch.bfloat16 and len(calls) == 4
    assert "moved" in caplog.text
    other = copy.deepcopy(served)
    other.load_state_dict(qmodel.state_dict())
    other(**batch)
    assert "other weights" in caplog.text and len(calls) == 4


def test_saved_packages_serve_again(
    pair: Any, calls: list[Any], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    qmodel, served, batch = pair
    caplog.set_level(logging.INFO, "qtk")
    served.save_pretrained(tmp_path)
    loaded = qtk.load(tmp_path, compiled=True)
    assert torch.equal(loaded(**batch)[0], served(**batch)[0]) and calls == [SIZE] * 2
    assert not caplog.records
    loaded.save_pretrained(tmp_path / "again")
    assert bundle_of(qtk.load(tmp_path / "again", compiled=True)) is not None
    plain = qtk.load(tmp_path)  # native code runs only where it is asked for
    assert bundle_of(plain) is None and "compiled=True" in caplog.text
    assert torch.equal(plain(**batch)[0], qmodel(**batch)[0])
    plain.save_pretrained(tmp_path)
    assert list(tmp_path.glob("compiled/*/*.pt2")), "the same weights: the packages stay"
    other, _ = quantized(w=6)
    other.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("compiled/*/*")), "other weights: they go"


def test_packages_of_another_machine_are_left_aside(
    pair: Any, calls: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    qmodel, served, batch = pair
    served.save_pretrained(tmp_path)
    here = package.here()
    for what, value in (("torch", "1.0"), ("cpu", ["sve"]), ("machine", "Plan9 mips")):
        caplog.clear()
        monkeypatch.setattr(bundle, "here", lambda what=what, value=value: {**here, what: value})
        loaded = qtk.load(tmp_path, compiled=True)
        assert bundle_of(loaded) is None and len(caplog.records) == 1
        assert "runs eager" in caplog.text
        assert torch.equal(loaded(**batch)[0], qmodel(**batch)[0])
    monkeypatch.undo()
    caplog.clear()
    qmodel.save_pretrained(tmp_path / "bare")
    assert bundle_of(qtk.load(tmp_path / "bare", compiled=True)) is None
    assert "no compiled packages" in caplog.text


def test_damaged_packages_are_refused(
    pair: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, served, _ = pair
    served.save_pretrained(tmp_path)
    (listed,) = tmp_path.glob("compiled/*/packages.json")
    (code,) = tmp_path.glob("compiled/*/*.pt2")
    good, found = code.read_bytes(), json.loads(listed.read_text())
    code.write_bytes(good[:-1])
    with pytest.raises(qtk.CheckpointError, match="compile again"):
        qtk.load(tmp_path, compiled=True)
    code.write_bytes(good)
    others = ({"version": 9}, {"routes": {"plain": 1}})
    for broken in ("{", "[]", *(json.dumps({**found, **other}) for other in others)):
        listed.write_text(broken)
        with pytest.raises(qtk.CheckpointError, match=r"packages\.json"):
            qtk.load(tmp_path, compiled=True)
    route = found["routes"]["plain"]
    route["signature"]["returns"] = "BertModel"
    listed.write_text(json.dumps(found))
    with pytest.raises(qtk.CheckpointError, match="BertModel"):
        qtk.load(tmp_path, compiled=True)
    listed.write_text(json.dumps({**found, "weights": "0"}))
    assert bundle_of(qtk.load(tmp_path, compiled=True)) is None
    assert "other weights" in caplog.text


def test_what_cannot_be_compiled_says_why(
    pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    qmodel, _, batch = pair
    with pytest.raises(qtk.ModelError, match=r"qtk\.quantize first"):
        qtk.compile(build("BertModel")[0])
    for sizes in ("1x16", 5, [5], [(1, 2, 3)], [(0, 5)], [(True, 5)], [("1", 5)]):
        with pytest.raises(qtk.SchemeError, match="rows and tokens"):
            qtk.compile(qmodel, sizes)
    with pytest.raises(qtk.SchemeError, match="positions for 64"):
        qtk.compile(qmodel, [(1, 65)])
    with pytest.raises(qtk.SchemeError, match="sizes"):
        qtk.compile(qmodel, [], dynamic=False)
    model, pictures = build("ViTModel", num_hidden_layers=1)
    seeing = qtk.quantize(model, calib=[pictures], progress=False)
    with pytest.raises(qtk.SchemeError, match="numbers of images"):
        qtk.compile(seeing, [(1, 16)])
    kernels = qtk.quantize(
        build("BertModel", num_hidden_layers=1)[0], calib=[batch], progress=False, backend="triton"
    )
    with pytest.raises(qtk.BackendError, match="backend='auto'"):
        qtk.compile(kernels)
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "no-compiler")))
    with pytest.raises(qtk.BackendError, match=r"apt-get install g\+\+"):
        qtk.compile(qmodel)


class Nowhere:
    """A package of a size."""

    def __init__(self, size: Any) -> None:
        self.size = size


def test_the_fastest_package_is_chosen_padded_or_not() -> None:
    small, large, any_size = Nowhere((1, 16)), Nowhere((1, 64)), Nowhere(None)
    timings = [
        Timing((1, 16), eager=4.0, static=1.0, dynamic=1.5),
        Timing((1, 64), eager=8.0, static=2.0, dynamic=6.0),
    ]
    nothing = Signature({}, {}, {}, "")
    route = Route(nothing, [small, large, any_size], timings)  # type: ignore[list-item]
    assert route.choose((1, 16)) is small and route.choose((1, 9)) is small
    assert route.choose((1, 17)) is any_size  # 1.6 s against 2 for the padded one
    assert route.choose((1, 40)) is large  # 3.8 against 2
    assert route.choose((2, 8)) is any_size and route.choose((9, 99)) is any_size
    slow = [replace(timing, eager=0.5) for timing in timings]
    assert Route(nothing, route.packages, slow).choose((1, 16)) is None
    fixed = Route(nothing, route.packages[:2], timings)
    assert fixed.choose((2, 16)) is None and fixed.choose((1, 65)) is None


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"w": 8}, {"w": 4}, {"activations": "token"}, {"a": 16, "group_size": 32},
    {"w": 4, "a": 4}, {"w": 4, "group_size": 16}, {"attention": "int8"},
], ids=str)  # fmt: skip
def test_one_package_for_any_size(options: dict[str, Any], calls: list[Any]) -> None:
    qmodel, batch = quantized(layers=2, **options)
    served = compiled(qmodel, [])
    assert same(qmodel, served, **batch)
    for rows, tokens in ((1, 1), (1, 7), (5, 1), (3, 33), (1, 64)):
        ids = torch.randint(3, 99, (rows, tokens))
        assert same(qmodel, served, input_ids=ids), (rows, tokens)
    assert calls == [None] * 6


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "BertForSequenceClassification", "BertForQuestionAnswering", "DistilBertModel",
    "RobertaForSequenceClassification",
])  # fmt: skip
def test_heads_and_families(name: str, calls: list[Any]) -> None:
    if name == "DistilBertModel":
        model, batch = build(name)
        qmodel = qtk.quantize(model, w=7, calib=[batch], progress=False)
    else:
        qmodel, batch = quantized(name)
    served = compiled(qmodel, [(2, 16)], dynamic=False)
    assert same(qmodel, served, **batch)
    assert same(qmodel, served, input_ids=torch.randint(3, 99, (1, 11)))
    assert calls == [(2, 16)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification"])
def test_images(name: str, calls: list[Any]) -> None:
    qmodel, _ = quantized(name)
    served = compiled(qmodel, [2])
    for rows in (2, 1, 3):
        assert same(qmodel, served, pixel_values=torch.randn(rows, 3, 16, 16))
    assert calls == [(2, None), (2, None), None]


@pytest.mark.slow
def test_a_cache_that_packages_do_not_have_comes_from_the_model(calls: list[Any]) -> None:
    model, batch = build("OPTModel", num_hidden_layers=1)
    qmodel = qtk.quantize(model, w=7, calib=[batch], progress=False)
    served = compiled(qmodel, [SIZE], dynamic=False)
    assert list(served(**batch)) == list(qmodel(**batch)) and len(served(**batch)) == 2
    assert not calls
    assert same(qmodel, served, **batch, use_cache=False) and calls == [SIZE]


@pytest.mark.slow
def test_a_language_model_with_its_cache(calls: list[Any]) -> None:
    qmodel, batch = quantized("OPTForCausalLM", layers=2)
    qmodel.generation_config.eos_token_id = None
    served = compiled(qmodel, [(1, 8)])
    assert same(qmodel, served, **batch, use_cache=False)
    for rows in (1, 2):
        ids = torch.randint(5, 99, (rows, 6))
        mask = torch.ones_like(ids)
        mask[-1, :2] = 0  # padded on the left
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
        calls.clear()
        wanted = qmodel.generate(ids, **options, num_beams=rows)
        assert not calls
        assert torch.equal(served.generate(ids, **options, num_beams=rows), wanted)
        assert len(calls) == 5
    with torch.no_grad():
        first = served(ids, use_cache=True)
        kept = first.to_tuple()[-1]
        second = served(ids[:, :1], past_key_values=kept, use_cache=True)
        whole = qmodel(torch.cat([ids, ids[:, :1]], 1), use_cache=False)
    assert cosine_similarity(second[0].flatten(), whole[0][:, -1:].flatten(), dim=0) > CLOSE


@pytest.mark.slow
def test_sentence_transformers(tiny_bert: Any, tmp_path: Any, calls: list[Any]) -> None:
    st = pytest.importorskip("sentence_transformers")
    texts = sentences(24)
    embedder = qtk.quantize(
        st.SentenceTransformer(str(tiny_bert), device="cpu"), w=7, calib=texts, progress=False
    )
    served = compiled_around(embedder)
    y, y_hat = (model.encode(texts, batch_size=2) for model in (embedder, served))
    assert calls and cosine_similarity(*map(torch.from_numpy, (y, y_hat))).min() > CLOSE
    served.save_pretrained(str(tmp_path))
    assert bundle_of(qtk.load(tmp_path, compiled=True)) is not None


@pytest.mark.slow
def test_a_bare_package_and_cpp(tmp_path: Any) -> None:
    """qtk.export(format="aoti"), loaded by PyTorch alone, and by the example without Python."""
    qmodel, _ = quantized(layers=2)
    found = qtk.export(qmodel, tmp_path / "out", format="aoti")
    assert found.cosine > CLOSE and found.files == ("model.pt2",)
    assert "token_type_ids int64 [rows, tokens]; input_ids" in found.notes[0]
    ids = torch.randint(3, 99, (1, 7))
    with torch.no_grad():
        y = qmodel(ids)[0].flatten()
    run = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    y_hat = run(torch.zeros_like(ids), ids, torch.ones_like(ids))[0].flatten()
    assert cosine_similarity(y, y_hat, dim=0) > CLOSE
    if not (compiler := shutil.which("g++")):
        pytest.skip("needs g++")
    torch_home, program = Path(torch.__path__[0]), tmp_path / "serve"
    includes = [f"-I{torch_home / 'include'}"]
    includes += [f"-I{torch_home / 'include/torch/csrc/api/include'}"]
    lib = torch_home / "lib"
    subprocess.run(
        [compiler, "-std=c++20", "-O0", str(EXAMPLES / "serve.cpp"), "-o", str(program), *includes,
         f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch", "-ltorch_cpu", "-lc10"], check=True,
    )  # fmt: skip
    numbers = [str(n) for n in ids[0].tolist()]
    command = [str(program), str(tmp_path / "out" / "model.pt2"), *numbers]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    printed = torch.tensor([float(line) for line in told.split()])
    assert torch.allclose(printed, y_hat, atol=1e-6, rtol=1e-6)


def compiled_around(embedder: Any) -> Any:
    served = qtk.compile(embedder, [(2, 16)], dynamic=False, tune=False, progress=False)
    assert type(served) is type(embedder) and served is not embedder
    bundle_of(served[0].model).routes["plain"].timings = []
    return served
