"""Calibration data in every form that users have it: what is read, and what is refused."""

import copy
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import qtk
from qtk.demo.sentences import sentences
from qtk.discover import load
from qtk.observe import batches, files
from qtk.observe.batches import prepare, stream
from tests.zoo import BERT, build


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> Any:
    """A small BERT with a tokenizer beside it."""
    return transformers.AutoModel.from_pretrained(tiny_bert).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small ViT with an image processor beside it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    build("ViTForImageClassification")[0].save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)
    return transformers.AutoModelForImageClassification.from_pretrained(folder).eval()


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (20, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in two class folders."""
    for name, seeds in (("cat", (0, 1, 2)), ("dog", (3, 4, 5))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for seed in seeds:
            picture(seed).save(tmp_path / "images" / name / f"{seed}.png")
    return tmp_path / "images"


def same(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> bool:
    return len(found) == len(wanted) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(found, wanted, strict=True)
    )


TEXTS = sentences(6)


# --- batches


def test_what_a_tokenizer_returns_is_one_batch(bert: Any, tokenizer: Any) -> None:
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert same(prepare(bert, encoded), [dict(encoded)])
    assert same(prepare(bert, [encoded, encoded]), [dict(encoded)] * 2)


def test_arrays_that_a_tokenizer_returns_are_tensors(bert: Any, tokenizer: Any) -> None:
    arrays = tokenizer(TEXTS, padding=True, return_tensors="np")
    wanted = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert same(prepare(bert, arrays), [dict(wanted)])
    (batch,) = prepare(bert, arrays["input_ids"])
    assert torch.equal(batch["input_ids"], wanted["input_ids"])


@pytest.mark.parametrize("name", ["label", "labels"])
def test_a_column_of_labels_is_no_input(bert: Any, tokenizer: Any, name: str) -> None:
    encoded = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    labels = torch.arange(6)
    (part,) = stream(bert, {**encoded, name: labels})
    assert same([part.batch], [encoded]) and torch.equal(part.labels, labels)
    assert part.names == list(range(6))


def test_rows_of_batches_are_counted_on(bert: Any) -> None:
    ids = torch.full((2, 3), 5)
    assert [part.names for part in stream(bert, [ids, ids[:1]])] == [[0, 1], [2]]


def test_choices_of_a_multiple_choice_model() -> None:
    torch.manual_seed(0)
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**BERT)).eval()
    ids = torch.randint(3, 99, (1, 4, 8))
    mask = torch.ones_like(ids)
    mask[0, 1:, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    for ranges in ("minmax", "hessian"):
        qmodel = qtk.quantize(model, calib=[batch], ranges=ranges, progress=False)
        assert qmodel(**batch).logits.shape == (1, 4)
    with pytest.raises(qtk.CalibrationError, match=r"\[batch, tokens\]"):
        prepare(build("BertModel")[0], ids)


def test_padding_of_choices_does_not_widen_a_grid() -> None:
    torch.manual_seed(0)
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**BERT)).eval()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0] *= 100
    ids = torch.randint(3, 99, (1, 4, 8))
    ids[..., 5:] = 0
    choices = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    flat = {name: value[0] for name, value in choices.items()}
    encoder = transformers.BertModel(model.config, add_pooling_layer=False).eval()
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    found = qtk.quantize(model, calib=[choices], progress=False, preset="fast")
    wanted = qtk.quantize(encoder, calib=[flat], progress=False, preset="fast")
    scales = [m.encoder.layer[0].attention.self.query.input_scale for m in (found.bert, wanted)]
    assert torch.equal(*scales)


# --- texts


@pytest.mark.parametrize("form", [
    lambda: np.array(TEXTS), lambda: iter(TEXTS), lambda: tuple(TEXTS),
    lambda: [(text, 1) for text in TEXTS], lambda: [{"text": text} for text in TEXTS],
    lambda: [{"sentence": text, "label": 1, "id": "a7"} for text in TEXTS],
    lambda: {"text": TEXTS, "label": [0] * 6}, lambda: [{"any": text, "idx": 3} for text in TEXTS],
])  # fmt: skip
def test_texts_in_every_form(bert: Any, form: Any) -> None:
    assert same(prepare(bert, form()), prepare(bert, TEXTS))


def test_labels_and_names_stay_with_their_texts(bert: Any, tokenizer: Any) -> None:
    texts = sorted(TEXTS, key=len, reverse=True)
    (part,) = stream(bert, [(text, i) for i, text in enumerate(texts)])
    assert part.labels == part.names != list(range(6))  # sorted by length
    ids_and_masks = part.batch["input_ids"], part.batch["attention_mask"]
    for ids, mask, i in zip(*ids_and_masks, part.names, strict=True):
        assert tokenizer(texts[i])["input_ids"] == ids[mask.bool()].tolist()


@pytest.mark.parametrize("data, told", [
    ([("a question", "an answer")], "pairs of sentences"),
    ([{"question": "a", "answer": "b"}], "the one text or image"),
    ([{"text": "a"}, {"input_ids": torch.ones(1, 2).long()}], "both text and batch"),
    ([(torch.ones(1, 2).long(),) * 3], "dicts that name"),
    ([(torch.full((1, 2), 5), torch.ones(1, 2))], "a mask or labels"),
    ([()], "an empty tuple"),
    (np.zeros((2, 3)), "must be int64"),
    ([Path("a.png")], "reads 'input_ids'"),
    ([picture()], "reads 'input_ids'"),
])  # fmt: skip
def test_what_may_be_misread_is_refused(bert: Any, data: Any, told: str) -> None:
    with pytest.raises(qtk.CalibrationError, match=told):
        prepare(bert, data)


@pytest.mark.parametrize("family, limit", [
    ("bert", 64), ("roberta", 62), ("xlm_roberta", 62), ("mpnet", 62), ("opt", 64),
])  # fmt: skip
def test_the_longest_sequence_is_read_and_no_longer_one(family: str, limit: int) -> None:
    model, _ = load("models", family).tiny()
    ids = torch.full((1, limit + 1), 5)
    prepare(model, ids[:, :limit])
    with torch.no_grad():
        model(ids[:, :limit])
    with pytest.raises(qtk.CalibrationError, match=f"{limit} positions"):
        prepare(model, ids)


@pytest.mark.parametrize("changes, told", [
    ({"position_ids": torch.full((1, 4), 999)}, "position_ids from 999"),
    ({"token_type_ids": torch.full((1, 4), 9)}, "token_type_ids from 9"),
    ({"inputs_embeds": torch.ones(1, 4, 32)}, "both 'input_ids' and 'inputs_embeds'"),
    ({"input_ids": None, "inputs_embeds": torch.ones(1, 4, 7)}, r"must be \[batch, tokens, 32\]"),
    ({"input_ids": torch.ones(1, 4, dtype=torch.long, device="meta")}, "on the meta device"),
    ({"attention_mask": torch.ones(1, 4).to_sparse()}, "an ordinary tensor"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"ranges": "hessian"}, {"w": 4, "bits": "auto"}])
def test_inputs_that_no_row_of_a_table_stands_for(
    changes: dict[str, Any], told: str, options: dict[str, Any]
) -> None:
    model, _ = build("BertModel")
    batch = {"input_ids": torch.full((1, 4), 5), **changes}
    with pytest.raises(qtk.CalibrationError, match=told):
        qtk.quantize(model, calib=[batch], progress=False, **options)


@pytest.mark.parametrize("options", [{}, {"ranges": "hessian"}])
def test_a_batch_that_fails_inside_the_model_is_named(options: dict[str, Any]) -> None:
    model, batch = build("BertModel")
    bad = {**batch, "attention_mask": torch.ones(2, 1, 3, 5)}
    with pytest.raises(qtk.CalibrationError, match="cannot read calibration batch 1"):
        qtk.quantize(model, calib=[batch, bad], progress=False, **options)


def test_lines_end_at_newlines_alone_and_a_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffone\u2028still\x0cone\r\n\n \ntwo\n".encode())
    assert list(files.lines(file)) == [(1, "one\u2028still\x0cone"), (4, "two")]


def test_a_line_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 8)
    file = tmp_path / "text.txt"
    file.write_text("0123456789" * 10 + "\nshort\n" + "x" * 16)
    assert list(files.lines(file)) == [(1, "01234567"), (2, "short"), (3, "x" * 8)]


def test_a_file_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i} {'x' * 100}\n" for i in range(30000)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_: pytest.fail("reads the whole file"))
        tracemalloc.start()
        drawn = files.draw_lines(file, 0, 20)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(set(drawn)) == 20 and held < file.stat().st_size / 3
    assert drawn == files.draw_lines(file, 0, 20) != files.draw_lines(file, 1, 20)


def test_only_the_start_of_an_endless_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "MAX_TEXT", 50)
    (tmp_path / "a.txt").write_text("a line\n" * 1000)
    with caplog.at_level(logging.WARNING, "qtk"):
        assert len(files.draw_lines(tmp_path / "a.txt", 0, 100)) == 8
    assert "only the first 56 characters" in caplog.text


def test_names_of_lines_are_those_of_an_editor(bert: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(f"\n{TEXTS[0]}\n\n{TEXTS[1]}\n")
    (part,) = stream(bert, file)
    assert sorted(map(str, part.names)) == ["line 2", "line 4"]


def test_long_lists_are_sorted_in_parts(bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SORTED", 4)
    monkeypatch.setattr(batches, "BATCH_SIZE", 3)
    parts = list(stream(bert, TEXTS))
    assert [len(part.names) for part in parts] == [3, 1, 2]
    assert sorted(n for part in parts for n in part.names) == list(range(6))


# --- tokenizers


def test_a_folder_without_tokenizer_files_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_bert / name).read_bytes())
    for call in (
        lambda: qtk.quantize(str(tmp_path), calib=TEXTS),
        lambda: qtk.evaluate(*[transformers.AutoModel.from_pretrained(tmp_path)] * 2, TEXTS),
    ):
        with pytest.raises(qtk.CalibrationError, match=r"is empty.*copy them there"):
            call()


def test_texts_that_are_mostly_unknown_are_refused(bert: Any) -> None:
    foreign = ["xyzzy plugh fnord", "quux grault garply"] * 4
    with pytest.raises(qtk.CalibrationError, match=r"100 % of the tokens are \[UNK\]"):
        prepare(bert, foreign)
    assert prepare(bert, [*TEXTS, "xyzzy"])  # a few are no mistake


@pytest.mark.parametrize("tokens, fits", [(99, True), (99 + 130, True), (99 + 300, False)])
def test_a_tokenizer_of_another_size_is_refused(tokens: int, fits: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w1"
    )
    model, _ = build("BertModel")
    if fits:
        assert prepare(model, ["w5 w6"], tokenizer)
        return
    with pytest.raises(qtk.CalibrationError, match="has 399 tokens and the model 99"):
        prepare(model, ["w5 w6"], tokenizer)


def test_a_tokenizer_may_be_its_folder(bert: Any, tiny_bert: Path, tmp_path: Path) -> None:
    model = transformers.BertModel(copy.deepcopy(bert.config)).eval()
    model.config._name_or_path = ""
    for folder in (tiny_bert, str(tiny_bert)):
        assert same(prepare(model, TEXTS, folder), prepare(bert, TEXTS))
    with pytest.raises(qtk.CalibrationError, match="no such folder"):
        prepare(model, TEXTS, tmp_path / "nowhere")


def test_a_tokenizer_without_padding_is_given_back_as_it_was(bert: Any, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.eos_token = None, "[PAD]"
    assert tokenizer.pad_token is None
    assert prepare(bert, TEXTS, tokenizer) and tokenizer.pad_token is None
    tokenizer.eos_token = None
    with pytest.raises(qtk.CalibrationError, match=r"set tokenizer\.pad_token"):
        prepare(bert, TEXTS, tokenizer)


# --- images


def test_images_in_every_form(vit: Any, folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in pictures]
    wanted = prepare(vit, folder, samples=100)
    (inputs,) = (x["pixel_values"].sort(0).values for x in wanted)
    for data in (
        paths, list(map(str, paths)), pictures, arrays, np.stack(arrays),
        [(image, 1) for image in pictures], [{"image": image, "label": 1} for image in pictures],
        [(path, 1) for path in paths],
    ):  # fmt: skip
        (batch,) = prepare(vit, data)
        assert torch.equal(batch["pixel_values"].sort(0).values, inputs)
    assert prepare(vit, paths[0])[0]["pixel_values"].shape == (1, 3, 16, 16)
    assert prepare(vit, pictures[0])[0]["pixel_values"].shape == (1, 3, 16, 16)


def test_pixels_with_labels_become_batches(vit: Any) -> None:
    pixels = torch.randn(3, 3, 16, 16)
    (part,) = stream(vit, list(zip(pixels, [4, 0, 1], strict=True)))
    assert torch.equal(part.batch["pixel_values"], pixels) and part.labels == [4, 0, 1]
    assert torch.equal(prepare(vit, pixels.numpy())[0]["pixel_values"], pixels)


def test_folders_name_the_classes(vit: Any, folder: Path) -> None:
    picture(9).save(folder / "loose.png")
    (part,) = stream(vit, folder)
    assert part.labels == ["cat"] * 3 + ["dog"] * 3 + [None]
    assert part.names[0] == os.path.join("cat", "0.png") and part.names[-1] == "loose.png"


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_images_of_other_colours_are_converted(vit: Any, mode: str) -> None:
    made = Image.new("I;16", (20, 24)) if mode == "I;16" else picture(mode=mode)
    (batch,) = prepare(vit, [picture(), made])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    (grey,) = prepare(vit, [np.asarray(picture(mode="L"))])
    assert torch.equal(grey["pixel_values"][0, 0], grey["pixel_values"][0, 1])


def test_grey_models_get_grey_images(folder: Path, tmp_path: Path) -> None:
    model, _ = build("ViTForImageClassification", num_channels=1)
    processor = transformers.ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5]
    )
    assert prepare(model, folder, processor)[0]["pixel_values"].shape == (6, 1, 16, 16)


def test_a_bad_image_is_left_out_and_counted(
    vit: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cat" / "0.png").write_text("no image")
    whole = (folder / "cat" / "1.png").read_bytes()
    (folder / "cat" / "1.png").write_bytes(whole[:200])
    with caplog.at_level(logging.WARNING, "qtk"):
        assert len(prepare(vit, folder)[0]["pixel_values"]) == 4
    assert "2 of 6 images cannot be read" in caplog.text and "0.png" in caplog.text


def test_a_folder_of_bad_images_is_refused(vit: Any, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("no image")
    with pytest.raises(qtk.CalibrationError, match=r"none of 3 images can be read: .*\.jpg"):
        prepare(vit, tmp_path)
    with pytest.raises(qtk.CalibrationError, match="none of 1 images can be read: cat is not"):
        prepare(vit, ["cat"])


def test_a_decompression_bomb_is_a_bad_image(
    vit: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 24)
    picture(size=(200, 200)).save(folder / "bomb.png")
    with caplog.at_level(logging.WARNING, "qtk"):
        assert len(prepare(vit, folder)[0]["pixel_values"]) == 6
    assert "decompression bomb" in caplog.text


def test_one_image_is_open_at_a_time(
    vit: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    alive: list[Any] = []
    most = 0
    convert = Image.Image.convert

    def watched(self: Image.Image, *args: Any) -> Image.Image:
        nonlocal most
        made = convert(self, *args)
        alive.append(weakref.ref(made))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(Image.Image, "convert", watched)
    prepare(vit, folder)
    assert len(alive) >= 6 and most <= 2


def test_images_without_pillow_name_the_extra(
    vit: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(qtk.CalibrationError, match=r"pip install 'qtk-torch\[images\]'"):
        prepare(vit, folder)


def test_a_tokenizer_is_no_image_processor(vit: Any, tokenizer: Any) -> None:
    with pytest.raises(qtk.CalibrationError, match="is not an image processor"):
        prepare(vit, [picture()], tokenizer)


def test_a_batch_without_a_batch_axis(vit: Any) -> None:
    with pytest.raises(qtk.CalibrationError, match=r"\[batch, channels, height, width\]"):
        prepare(vit, [{"pixel_values": torch.ones(3, 16, 16)}])
    with pytest.raises(qtk.CalibrationError, match="reads 'pixel_values'"):
        prepare(vit, [{"inputs_embeds": torch.ones(1, 4, 32)}])


def test_a_pipe_among_images_is_passed_over(vit: Any, folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    assert len(prepare(vit, folder)[0]["pixel_values"]) == 6


def test_a_name_too_long_for_a_file_is_no_path(bert: Any) -> None:
    with pytest.raises(qtk.CalibrationError, match="does not exist"):
        prepare(bert, "a sentence " * 100)


def test_data_is_read_as_it_is_needed(bert: Any) -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.full((1, 3), 5)

    assert next(stream(bert, endless())).names == [0]
