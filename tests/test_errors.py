"""What a user can do wrong: each mistake is a QtkError that says what to do."""

import pytest
import torch
import transformers
from torch import nn

import qtk
from qtk.errors import BackendError, CalibrationError, CheckpointError, ModelError, SchemeError
from tests.zoo import build

NAN = float("nan")


def run(name="BertModel", *args, **options):
    model, batch = build(name) if isinstance(name, str) else name
    return qtk.quantize(model, *args, **{"calib": [batch], "progress": False, **options})


def bert(**changes):
    return build("BertModel", **changes)


def ids(*values):
    return torch.tensor([values])


def gpt2():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=99)
    return transformers.GPT2Model(config), bert()[1]


def with_type(model_type):
    model, batch = bert()
    model.config.model_type = model_type
    return model, batch


def with_weight(value):
    model, batch = bert()
    nn.init.constant_(model.encoder.layer[0].intermediate.dense.weight, value)
    return model, batch


def with_embeddings(value):
    model, batch = bert()
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.fill_(value)
    return model, batch


def on_meta():
    model, batch = bert()
    return model.to("meta"), batch


def twice():
    model, batch = bert()
    return run((qtk.quantize(model, calib=[batch], progress=False), batch))


MODELS = {
    "an unsupported architecture": (lambda: run(gpt2()), "supported: .*, bert"),
    "a kin of BERT that is not known": (lambda: run(with_type("berty")), "not supported"),
    "an int": (lambda: run((7, {})), "give a model, a folder or a hub name"),
    "None": (lambda: run((None, {})), "give a model, a folder or a hub name"),
    "a bare layer": (lambda: run((nn.Linear(2, 2), {})), "put it into an nn.Sequential"),
    "no such path": (lambda: run(("./nowhere/model", {})), "cannot load './nowhere/model'"),
    "quantized already": (twice, "start from the floating-point model"),
    "no weights": (lambda: run(on_meta()), "load its weights first"),
    "weights of nan": (lambda: run(with_weight(NAN)), "intermediate.dense.weight holds nan"),
    "weights of nan, no data": (lambda: run(with_weight(NAN), calib=None), "holds nan"),
    "summary of a float model": (lambda: qtk.summary(bert()[0]), "run qtk.quantize first"),
    "summary of an int": (lambda: qtk.summary(3), "not quantized by qtk"),
}

SCHEMES = {
    "weights='both'": (lambda: run(weights="both"), "choose 'symmetric' or 'asymmetric'"),
    "asymmetric weights": (lambda: run(weights="asymmetric"), "weights='symmetric', or a=16"),
    "w=1": (lambda: run(w=1), "w=1: choose 2 to 8"),
    "w=9": (lambda: run(w=9), "w=9: choose 2 to 8"),
    "w=8.0": (lambda: run(w=8.0), r"w=8\.0: choose"),
    "a=3": (lambda: run(a=3), "a=3: choose 4 to 8"),
    "a=True": (lambda: run(a=True), "a=True: choose"),
    "a='8'": (lambda: run(a="8"), "a='8': choose"),
    "float weights alone": (lambda: run(w=16, a=8), r"quantize the weights too \(w=8\)"),
    "nothing": (lambda: run(w=16, a=16), "nothing is left to quantize"),
    "method": (lambda: run(method="magic"), r"method='magic': choose .*'smoothquant'"),
    "rounding": (lambda: run(rounding="up"), "rounding='up': choose .*'nearest'"),
    "ranges": (lambda: run(ranges="all"), "ranges='all': choose 'auto'"),
    "activations": (lambda: run(activations="row"), "choose 'static' or 'token'"),
    "activations, no data": (lambda: run(activations="row", calib=None), "'static' or 'token'"),
    "preset": (lambda: run(preset="magic"), "preset='magic'"),
    "seed": (lambda: run(seed="a"), "give an integer"),
    "seed of 70 bits": (lambda: run(seed=2**70), "at most 63 bits"),
    "seed=True": (lambda: run(seed=True), "give an integer"),
    "groups longer than every row": (
        lambda: run(w=4, group_size=100_000),
        "longest row that it is for has 64",
    ),
    "ranges without activations": (lambda: run(w=4, a=16, ranges="mse"), "no layer has"),
    "activations without any": (
        lambda: run(w=4, a=16, activations="token"),
        "no layer has integer activations",
    ),
    "a method for no layer": (
        lambda: run(w=16, a=16, softmax="log2", method="rotate"),
        "no linear of the blocks is",
    ),
    "groups of no weights": (
        lambda: run(w=16, a=16, softmax="log2", group_size=16),
        "no layer has integer weights",
    ),
    "a rule that ends no token's grid": (
        lambda: run(activations="token", ranges="tokenwise"),
        "goes with 'auto', 'hessian', 'min",
    ),
    "the same without data": (
        lambda: run(calib=None, ranges="averaged"),
        "without calib, activations are dynamic",
    ),
    "gradients without data": (lambda: run(calib=None, ranges="hessian"), "needs calibration data"),
    "a preset with nothing to fill in": (
        lambda: run(preset="fast", method="none", rounding="gptq", ranges="mse"),
        "all three are",
    ),
    "more bits where all have eight": (lambda: run(bits="auto"), "all have as many"),
    "automatic bits without data": (lambda: run(w=4, calib=None, bits="auto"), "give calib"),
    "an option of a pattern that is none": (
        lambda: run(bits={"*": {"bits": 4}}),
        r"has 'bits'; choose w, a, group_size",
    ),
    "an empty dict of a pattern": (lambda: run(bits={"*": {}}), "or a dict such as"),
    "ranges of a pattern without activations": (
        lambda: run(bits={"*dense": {"a": 16, "ranges": "mse"}}),
        "nothing there has a grid for",
    ),
    "a method for the head": (
        lambda: run(bits={"pooler.dense": {"w": 8, "method": "rotate"}}),
        "leave out method",
    ),
    "learn": (lambda: run(learn="all"), "learn='all': choose 'none', 'block', 'model'"),
    "two ways to learn": (lambda: run(rounding="tuned", learn="block"), "give one of the two"),
    "group_size=0": (lambda: run(group_size=0), "give a positive integer"),
    "group_size=-1": (lambda: run(group_size=-1), "give a positive integer"),
    "group_size=True": (lambda: run(group_size=True), "give a positive integer"),
    "group_size=1.5": (lambda: run(group_size=1.5), "give a positive integer"),
    "bits of no layer": (lambda: run(bits={"*none*": (4, 4)}), "matches no linear"),
    "bits not a pair": (lambda: run(bits={"*": 4}), r"give a pair \(w, a\)"),
    "bits of three": (lambda: run(bits={"*": (4, 4, 4)}), r"give a pair \(w, a\)"),
    "bits out of range": (lambda: run(bits={"*": (1, 4)}), "w=1: choose"),
    "bits as a list": (lambda: run(bits=[(4, 4)]), "give {pattern"),
    "a pattern that is a number": (lambda: run(bits={3: (4, 4)}), "patterns of module names"),
    "skip everything": (lambda: run(skip=["*"]), "nothing is left to quantize"),
    "skip of no layer": (lambda: run(skip=["*head*"]), "matches no linear"),
    "skip a number": (lambda: run(skip=3), "are strings"),
    "attention": (lambda: run(attention="int3"), "attention='int3': choose 'float', 'int8'"),
    "attention as a number": (lambda: run(attention=8), "attention=8: choose"),
    "softmax": (lambda: run(softmax="int4"), "softmax='int4': choose 'float', 'uniform'"),
    "bits of a float softmax": (lambda: run(softmax_bits=8), "stays in floating point"),
    "bits of code": (lambda: run(softmax="code", softmax_bits=4), "choose 5, 6, 7"),
    "bits of log2": (lambda: run(softmax="log2", softmax_bits=9), "choose 2, 3, 4"),
    "bits of matthew": (lambda: run(softmax="matthew", softmax_bits=True), "choose 2, 3"),
}

BACKENDS = {
    "a backend that is not": (lambda: run(backend="cuda"), "backend='auto' chooses by device"),
    "the CPU's on a GPU model": (lambda: run(gpu(), backend="cpu"), "backend='auto'"),
}

DATA = {
    "no batches": (lambda: run(calib=[]), "give at least one batch"),
    "empty strings": (lambda: run(calib=["", " "]), "only empty strings"),
    "strings without a tokenizer": (lambda: run(calib=["a sentence"]), "pass tokenizer="),
    "strings for images": (lambda: run("ViTModel", calib=["cat"]), "pass tokenizer="),
    "not a tokenizer": (lambda: run(calib=["a"], tokenizer=3), "is not a tokenizer"),
    "a path that is not": (lambda: run(calib="nofile.txt"), "'nofile.txt' does not exist"),
    "an int": (lambda: run(calib=3), "give batches"),
    "a list of ints": (lambda: run(calib=[3]), "give batches"),
    "strings and batches": (lambda: run(calib=["a", {"input_ids": ids(1)}]), "only strings"),
    "an empty batch": (lambda: run(calib=[{}]), "reads 'input_ids'"),
    "no rows": (lambda: run(calib=[{"input_ids": ids(1)[:0]}]), "'input_ids' is empty"),
    "images for a text model": (
        lambda: run(calib=[{"pixel_values": torch.ones(1, 3, 16, 16)}]), "right tokenizer"),
    "text for an image model": (
        lambda: run("ViTModel", calib=[{"input_ids": ids(1)}]), "reads 'pixel_values'"),
    "lists": (lambda: run(calib=[{"input_ids": [[1, 2]]}]), "return_tensors='pt'"),
    "float ids": (lambda: run(calib=[{"input_ids": ids(1.0)}]), "must be int64"),
    "ids without a batch axis": (
        lambda: run(calib=[{"input_ids": ids(1)[0]}]), r"must be \[batch, tokens\]"),
    "another tokenizer": (lambda: run(calib=[{"input_ids": ids(99)}]), "token id 99 is outside"),
    "negative ids": (lambda: run(calib=[{"input_ids": ids(-1)}]), "token id -1 is outside"),
    "too long": (
        lambda: run(calib=[{"input_ids": ids(*[5] * 65)}]), "65 tokens.*truncate"),
    "too long for RoBERTa": (
        lambda: run("RobertaForSequenceClassification", calib=[{"input_ids": ids(*[5] * 63)}]),
        "62 positions; truncate"),
    "a mask that hides all": (
        lambda: run(calib=[{"input_ids": ids(1, 2), "attention_mask": ids(0, 0)}]),
        "hides every token"),
    "a mask of another shape": (
        lambda: run(calib=[{"input_ids": ids(1, 2), "attention_mask": ids(1, 1, 1)}]),
        "attention_mask has shape"),
    "nan in images": (
        lambda: run("ViTModel", calib=[{"pixel_values": torch.full((1, 3, 16, 16), NAN)}]),
        "drop or repair the batch"),
    "images of another size": (
        lambda: run("ViTModel", calib=[{"pixel_values": torch.ones(1, 3, 20, 20)}]),
        "cannot read calibration batch 0.*16"),
    "positions that are not": (
        lambda: run(calib=[{"input_ids": ids(1, 2), "position_ids": ids(999, 999)}]),
        "position_ids from 999"),
    "the same where gradients come first": (
        lambda: run(calib=[{"input_ids": ids(1)}, {"input_ids": ids(1), "token_type_ids": ids(9)}],
                    ranges="hessian"), "batch 1: token_type_ids from 9"),
    "the same where bits come first": (
        lambda: run(w=4, calib=[{"inputs_embeds": torch.ones(1, 2, 5)}], bits="auto"),
        "inputs_embeds have shape"),
    "ids and embeddings": (
        lambda: run(calib=[{"input_ids": ids(1), "inputs_embeds": torch.ones(1, 1, 32)}]),
        "leave one out"),
    "a tensor without data": (
        lambda: run(calib=[{"input_ids": ids(1).to("meta")}]), "on the meta device; give an"),
    "sparse": (
        lambda: run(calib=[{"input_ids": ids(1).to_sparse()}]), "of layout torch.sparse_coo; give"),
    "embeddings that overflow": (lambda: run(with_embeddings(3e38)), "check the calibration data"),
}  # fmt: skip


def with_huge(name, value=1e38):
    """A tiny BERT one of whose numbers is huge, but finite."""
    model, batch = bert()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model, batch


LAYER = "encoder.layer.0"
HUGE = {
    "a bias": (f"{LAYER}.intermediate.dense.bias", 1e38),
    "a bias of q": (f"{LAYER}.attention.self.query.bias", 1e38),
    "a bias of v": (f"{LAYER}.attention.self.value.bias", 3e38),
    "a weight": (f"{LAYER}.output.dense.weight", 1e30),
    "a norm": (f"{LAYER}.output.LayerNorm.weight", 1e35),
}


@pytest.mark.parametrize("options", [
    {}, {"preset": "fast"}, {"w": 4, "a": 4}, {"w": 4, "a": 16}, {"activations": "token"},
    {"rounding": "adaround"}, {"rounding": "nearest", "method": "none", "ranges": "minmax"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", HUGE)
def test_numbers_that_overflow_are_found_before_anything_is_saved(name, options, tmp_path):
    """Either the message has the place, or the model is whole: finite, saved and read again."""
    model, batch = with_huge(*HUGE[name])
    try:
        qmodel = run((model, batch), **options)
    except (CalibrationError, ModelError) as error:
        assert "layer." in str(error) and "overflows" in str(error)
        return
    qmodel.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.isfinite(qtk.load(tmp_path)(**batch)[0]).all()


def test_a_block_that_overflows_in_floating_point_is_named():
    model, batch = with_huge(f"{LAYER}.attention.output.dense.bias", 3.4e38)
    with torch.no_grad():
        model.encoder.layer[0].attention.output.LayerNorm.weight.fill_(3e38)
    with pytest.raises(CalibrationError, match=r"encoder\.layer\.0, in floating point, gives nan"):
        run((model, batch))


@pytest.mark.parametrize("where", ["a site", "learning"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_model_that_was_quantized_by_half_cannot_be_saved(where, error, monkeypatch, tmp_path):
    model, batch = bert()
    target = {"a site": "quantize_site", "learning": "learning.learn_model"}[where]
    real, calls = qtk.pipeline.quantize_site, []

    def interrupted(*args, **options):
        calls.append(args)
        if where == "learning" or len(calls) == 3:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(f"qtk.pipeline.{target}", interrupted)
    with pytest.raises(error):
        run((model, batch), inplace=True, rounding="tuned")
    assert any(isinstance(m, qtk.modules.linear.QuantLinear) for m in model.modules())
    with pytest.raises(ModelError, match="load the floating-point model again"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="start from the floating-point model"):
        run((model, batch))


def test_a_model_that_was_quantized_in_place_can_be_saved(tmp_path):
    model, batch = bert()
    run((model, batch), inplace=True).save_pretrained(tmp_path)
    assert qtk.load(tmp_path)


def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, batch = bert()
    return model.cuda(), batch


def cases(kind, table):
    return [pytest.param(kind, act, told, id=name) for name, (act, told) in table.items()]


@pytest.mark.parametrize("kind, act, told", [
    *cases(ModelError, MODELS), *cases(SchemeError, SCHEMES), *cases(CalibrationError, DATA),
    *cases(BackendError, BACKENDS),
])  # fmt: skip
def test_a_mistake_is_told_with_its_remedy(kind, act, told):
    with pytest.raises(kind, match=f"(?s){told}"):
        act()


def test_triton_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("qtk_kernels.dispatch.INTERPRETED", False)
    with pytest.raises(BackendError, match="backend='auto' chooses by device"):
        run(backend="triton")


def test_nothing_is_changed_when_a_mistake_is_found():
    model, batch = bert()
    for options in ({"w": 1}, {"calib": []}, {"skip": ["*"]}, {"backend": "cuda"}):
        with pytest.raises(qtk.QtkError):
            run((model, batch), inplace=True, **options)
    assert not any(isinstance(m, qtk.modules.linear.QuantLinear) for m in model.modules())


@pytest.mark.parametrize("write, told", [
    (lambda f: f.write_text("\n \n"), "holds no text lines"),
    (lambda f: f.write_bytes(b"\xff\xfe\xff"), "not a UTF-8 text file"),
    (lambda f: f.mkdir(), "holds no text lines and no images"),
    (lambda f: (f.mkdir(), (f / "a.png").write_text("no")), "calib holds images"),
])  # fmt: skip
def test_calibration_files_that_cannot_be_read(tmp_path, write, told):
    write(tmp_path / "calib")
    with pytest.raises(CalibrationError, match=told):
        run(calib=tmp_path / "calib")


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_saving_onto_a_file(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        run().save_pretrained(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


def test_loading_what_is_no_quantized_model(tmp_path):
    bert()[0].save_pretrained(tmp_path)
    for path, told in ((tmp_path, r"qtk\.quantize makes such"), (3, "give the folder")):
        with pytest.raises(CheckpointError, match=told):
            qtk.load(path)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="cannot load"):
        run((str(tmp_path), {}))


def test_a_row_that_is_all_padding_is_no_mistake():
    model, batch = bert()
    batch["attention_mask"][1] = 0
    for activations in ("static", "token"):
        run((model, batch), activations=activations)


def test_every_error_is_of_one_family():
    for error in (BackendError, CalibrationError, CheckpointError, ModelError, SchemeError):
        assert issubclass(error, qtk.QtkError)
    assert issubclass(SchemeError, ValueError) and issubclass(CalibrationError, ValueError)
