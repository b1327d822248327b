"""Commands that ask whether a quantized model can be trusted as the float one was."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

import qtk
from qtk.commands.options import (
    AsJson,
    Device,
    Float,
    Model,
    Page,
    Quantized,
    Seed,
    Tokenizer,
    one_of,
)
from qtk.commands.shown import errors, load, print_json, show
from qtk.discover import available
from qtk.errors import SchemeError

SUITES = ("attacks", "corruptions", "system", "grid", "text")


def robust(
    float_model: Float,
    quantized: Annotated[
        list[Path], typer.Argument(metavar="QUANTIZED...", help="Folders of models saved by qtk.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of images a class, or lines TEXT<tab>CLASS.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(help=f"{one_of('Groups', SUITES)} Or a part by name; may be repeated."),
    ] = None,
    second: Annotated[
        Path | None, typer.Option(help="The first QUANTIZED, calibrated with another seed.")
    ] = None,
    tokenizer: Tokenizer = None,
    samples: Annotated[int | None, typer.Option(help="Drawn from the data; all if none.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="small, mid or large; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the attacks that go step by step.")] = 10,
    severity: Annotated[
        list[int] | None, typer.Option(help="Of corruptions, 1 to 5; may be repeated.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough/--spare", help="Spare what APGD has wrong other attacks.")
    ] = True,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, .md and .json.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of answers to go on from.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Attack, corrupt and disturb FLOAT and each QUANTIZED alike, and compare."""
    from qtk.robust import write_report
    from qtk.robust.suite import LEVELS

    model = load(float_model, None, None)
    studies: dict[str, qtk.Robustness] = {}
    given: Any = _pairs_of_text(data) if data.is_file() else data
    for place, folder in enumerate(quantized):
        studies[_distinct(folder, studies)] = qtk.robustness(
            model, qtk.load(folder), given, suite or ["attacks"], tokenizer,
            second=second if place == 0 else None, samples=samples, budgets=budget or LEVELS[:2],
            steps=steps, severities=severity or (1, 2, 3, 4, 5), thorough=thorough,
            batch_size=batch_size, resume=resume, seed=seed, progress=not as_json,
        )  # fmt: skip
    files = [] if out is None else [str(file) for file in write_report(studies, out)]
    if as_json:
        told = {name: study.to_dict() for name, study in studies.items()}
        print_json({"models": told, "files": files})
        return
    for name, study in studies.items():
        typer.echo(f"{name}\n{study.table()}\n")
    if files:
        typer.echo(f"written: {', '.join(files)}")


def _pairs_of_text(file: Path) -> list[tuple[str, int | str]]:
    """Lines of a text and, after a tab, its class: a number or a name."""
    pairs: list[tuple[str, int | str]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text, tab, label = line.rpartition("\t")
        if not tab:
            raise SchemeError(f"{file}, line {number}: no tab between a text and its class")
        pairs.append((text, int(label) if label.strip().isdigit() else label.strip()))
    return pairs


def _distinct(folder: Path, taken: Iterable[str]) -> str:
    """The folder's name, or its path where that is taken."""
    name = folder.resolve().name
    return str(folder) if name in taken else name


def fair(
    float_model: Float,
    quantized: Quantized,
    rows: Annotated[Path, typer.Option(help="CSV file with a head, or sentences, one a line.")],
    protected: Annotated[
        list[str] | None, typer.Option(help="Column that must not matter; may be repeated.")
    ] = None,
    columns: Annotated[
        Path | None, typer.Option(help="columns.json of the rows, if not in FLOAT.")
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the labels, if there is one.")] = "label",
    swaps: Annotated[
        Path | None, typer.Option(help="JSON of word: counterpart; he/she and others if none.")
    ] = None,
    second: Annotated[
        Path | None, typer.Option(help="QUANTIZED with another calibration seed: the noise floor.")
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(help=one_of("Where to look", available("fair.probe")) + " May be repeated."),
    ] = None,
    n: Annotated[int, typer.Option(help="Rows that a probe tries.")] = 3000,
    html: Page = None,
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Find whom QUANTIZED treats otherwise than FLOAT: discriminatory rows, groups, churn."""
    from qtk.fair.rows import Columns
    from qtk.fair.text import read_swaps
    from qtk.observe.files import lines

    told: dict[str, Any] = {
        "second": None if second is None else qtk.load(second), "n": n, "seed": seed,
        "progress": not as_json, **({"probe": probe} if probe else {}),
    }  # fmt: skip
    model, qmodel = load(float_model, None, None), qtk.load(quantized)
    if rows.suffix.lower() == ".csv":
        if not protected:
            raise SchemeError("name the column that must not matter: --protected sex")
        known = Columns.load(columns or float_model)
        given, labels = known.read(rows, label)
        attributes = [known.attribute(name) for name in protected]
        result = qtk.fairness(model, qmodel, given, attributes, labels, domain=known.domain, **told)
    else:
        sentences = [text for _, text in lines(rows)]
        result = qtk.fairness(
            model, qmodel, sentences, read_swaps(swaps), None, tokenizer, **told
        )  # fmt: skip
    if html is not None:
        qtk.trust_page(result, html)
    show(result, as_json)


def steal(
    float_model: Float,
    quantized: Quantized,
    test: Annotated[Path, typer.Option(help="Folder of images, in a folder for each class.")],
    inside: Annotated[Path, typer.Option(help="Folder of other images of the same kind.")],
    outside: Annotated[
        list[Path], typer.Option(help="Folder of images of another kind; may be repeated.")
    ],
    thief: Annotated[
        list[str] | None,
        typer.Option(help=one_of("Who asks", available("security.thief")) + " May be repeated."),
    ] = None,
    answers: Annotated[
        list[str] | None, typer.Option(help="soft, rounded or hard; may be repeated.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Queries at most.")] = 3000,
    clone: Annotated[str, typer.Option(help="What learns from the answers: cnn or mlp.")] = "cnn",
    epochs: Annotated[int, typer.Option(help="That it learns.")] = 15,
    seeds: Annotated[int, typer.Option(help="Clones of each kind.")] = 3,
    resume: Annotated[Path | None, typer.Option(help="Folder of figures to go on from.")] = None,
    html: Page = None,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Clone FLOAT and QUANTIZED by asking them: does rounding help thieves or hinder them?"""
    from qtk.security.pictures import labelled, pictures

    model = load(float_model, None, None)
    folders = {"in": inside, **{each.name: each for each in outside}}
    if len(folders) <= len(outside):
        raise SchemeError("--outside folders need different names, and none is called in")
    pool = {name: pictures(model, folder, tokenizer) for name, folder in folders.items()}
    result = qtk.steal(
        model, qtk.load(quantized), pool, labelled(model, test, tokenizer),
        thief=thief or ["knockoff"], answers=answers or ["soft", "hard"], budget=budget,
        clone=clone, epochs=epochs, seeds=range(seeds), resume=resume, progress=not as_json,
    )  # fmt: skip
    if html is not None:
        qtk.trust_page(result, html)
    show(result, as_json)


def xray(
    float_model: Float,
    quantized: Quantized,
    scenes: Annotated[
        Path | None, typer.Option(help="File of Scenes.save, half to craft on; drawn if none.")
    ] = None,
    craft: Annotated[int, typer.Option(help="Scenes drawn to learn shapes on.")] = 200,
    test: Annotated[int, typer.Option(help="Scenes drawn to judge them on.")] = 300,
    objects: Annotated[int, typer.Option(help="In a scene.")] = 2,
    patch: Annotated[int, typer.Option(help="Pixels of the square that holds one.")] = 10,
    material: Annotated[str, typer.Option(help="iron, aluminium or plastic.")] = "iron",
    steps: Annotated[int, typer.Option(help="Of learning shapes.")] = 24,
    resume: Annotated[Path | None, typer.Option(help="Folder of shapes to go on from.")] = None,
    html: Page = None,
    pictures: Annotated[Path | None, typer.Option(help="PNG: scenes, thickness, attacked.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Lay metal objects, shaped on FLOAT and on QUANTIZED, into X-ray scenes, and ask both."""
    from qtk.physical.scene import Scenes, draw

    if scenes is None:
        parts = draw(craft, 2 * seed), draw(test, 2 * seed + 1)
    else:
        held = Scenes.load(scenes)
        half = len(held.labels) // 2
        parts = held.part(0, half), held.part(half, len(held.labels))
    result = qtk.xray(
        load(float_model, None, None), qtk.load(quantized), *parts, objects=objects, patch=patch,
        material=material, steps=steps, resume=resume, seed=seed, progress=not as_json,
    )  # fmt: skip
    if html is not None:
        qtk.trust_page(result, html)
    if pictures is not None:
        result.contact_sheet(pictures)
    show(result, as_json)


def audit(
    model: Model,
    calib: Annotated[Path, typer.Option(help="Text file or folder of images, without labels.")],
    w: Annotated[int, typer.Option("--w", help="Bits that its weights would have, 2 to 8.")] = 8,
    tokenizer: Tokenizer = None,
    device: Device = None,
    report: Annotated[Path | None, typer.Option(help="Page to write, with plots.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Look for a backdoor in MODEL, a classifier, that rounding its weights would wake."""
    with errors.status("looking"):
        found = qtk.audit(load(model, None, device), calib, tokenizer or model, w=w, seed=seed)
    if report is not None:
        qtk.trust_page({f"Audit of {Path(model).name}": found}, report)
    show(found, as_json)
