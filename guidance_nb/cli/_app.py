"""`guidance-nb`: thin commands over the functions of the package, which are imported when a command is given."""

import json
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from guidance_nb import __version__
from guidance_nb._checks import require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import Json, check_folder

with extra("cli"):
    import typer
    from typer.core import TyperCommand

if TYPE_CHECKING:
    from guidance_nb.cli._recipe import Recipe, Table
    from guidance_nb.images._data import SampleFile
    from guidance_nb.training import State

_N = TypeVar("_N", int, float)

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


def parse_keys(
    words: list[str],  # What follows a command: one place, and --key value, --key=value, --switch, --no-switch
    kind: "type[Table]",  # Whose keys the flags name
) -> tuple[str, dict[str, str]]:  # The place, and values by key
    "Read flags that name keys, each of them once."
    from guidance_nb.cli._recipe import find_key, is_switch

    places, flags, rest = list[str](), dict[str, str](), deque(words)
    while rest:
        word = rest.popleft()
        if not word.startswith("--"):
            places.append(word)
            continue
        name, given, value = word[2:].partition("=")
        off = not given and name.startswith("no-") and is_switch(find_key(name[3:], kind), kind)
        key = find_key(name[3:] if off else name, kind)
        if off or (is_switch(key, kind) and not given and (not rest or rest[0] not in ("true", "false"))):
            value = str(not off).lower()
        elif not given:
            require_that(rest and not rest[0].startswith("--"), f"{word} has no value", f"{word} value")
            value = rest.popleft()
        require(key not in flags, f"--{key}", value, f"once, and {flags.get(key)!r} was given before")
        flags[key] = value
    require(len(places) == 1, "names", places, "one, besides --key value; --help says of what")
    return places[0], flags


class _Command(TyperCommand):
    "A command whose options are given once, and not empty."

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        "Raise an error for what would be silently replaced or read as nothing."
        if not {"--help", "--install-completion"} & set(args):
            given, _, order = self.make_parser(ctx).parse_args(args=list(args))
            names = [str(part.name) for part in order if part.param_type_name == "option"]
            for name in names:
                require(names.count(name) == 1 and given[name] != "", f"--{name}", given[name], "a value, given once")
        return super().parse_args(ctx, args)


class _KeyCommand(_Command):
    "A command that takes keys as flags; its help ends with them and, for recipes, with the recipes that there are."

    def get_help(self, ctx: typer.Context) -> str:
        "The help."
        from guidance_nb.cli._recipe import FineTuning, Recipe, Table, read_recipe, recipe_keys, recipe_names
        from guidance_nb.cli._run import Request

        kinds: dict[str, type[Table]] = {"sample": Request, "sweep": Request, "finetune": FineTuning}
        kind = kinds.get(str(self.name), Recipe)
        names = recipe_names(kind) if kind is not Request else []
        known = [f"{name}: {dict(read_recipe(name, kind=kind))['title']}." for name in names]
        usual = {n: f" Default: {value}." for n, value in Request() if kind is Request and value not in (None, "")}
        keys = [f"--{n.replace('_', '-')}: {what}.{usual.get(n, '')}" for n, what in recipe_keys(kind).items()]
        self.epilog = "\n\n".join([*(known and ["Recipes:", *known]), "Keys, which are flags, too:", *keys])
        return super().get_help(ctx)


_KEYS: Json = {"cls": _KeyCommand, "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def _show_version(wanted: bool) -> None:
    "Print the version and stop, if that is `wanted`."
    if wanted:
        typer.echo(f"guidance-nb {__version__}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, help="Show it and stop.")] = False,
) -> None:
    "Guidance in diffusion and flow models: learn, compare and use five methods."


def _split(text: str) -> tuple[str, ...]:
    "The parts of a `text` with commas."
    return tuple(text.split(",")) if text else ()


def _parse_numbers(name: str, text: str, kind: type[_N]) -> tuple[_N, ...]:
    "Read a list of numbers of a `kind`; `name` is the option's, for the message."
    try:
        return tuple(kind(part) for part in _split(text))
    except ValueError:
        words = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name} = {text!r}; allowed: {words} separated by commas, such as 1,2,3") from None


def _tell(text: str) -> None:
    "Print a `text`, in the main process alone."
    from guidance_nb.cli._devices import is_main

    if is_main():
        typer.echo(text)


def _train(states: "Iterable[State]", told: str) -> None:
    "Run a training to its end, and tell."
    for state in states:
        last = state
    _tell(f"{last.step} steps done, loss {last.loss:.4g}; {told}")


_RecipeName = Annotated[str, typer.Argument(help="A recipe by name, or a TOML file.")]
_Split = Annotated[str, typer.Option(help="train or test, of mnist and cifar10.")]
_Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
_Checkpoint = Annotated[str, typer.Argument(help="A checkpoint, the folder of a run, or a name of guidance-nb models.")]
_Classifier = Annotated[str | None, typer.Option(help="Guide by this classifier, not by the null label.")]
_SampleOut = Annotated[Path, typer.Option(help="An .npz file, a .png for one picture of all, or a folder for PNGs.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace samples that are there.")]
_Samples = Annotated[str, typer.Argument(help="Samples of any origin: .npz, or a folder of images.")]
_FeatureExtractor = Annotated[
    str, typer.Option("--features", help="inception-v3-compat, resnet20, resnet56, or a classifier's checkpoint.")
]
_Weights = Annotated[str | None, typer.Option(help="Local file with the weights of a named feature extractor.")]
_RealData = Annotated[
    str, typer.Option("--reference", help="mnist, cifar10, images (.npz, or a folder, resized), or ADM statistics.")
]


@app.command(name="tour", cls=_Command)
def _tour(
    data: Annotated[str, typer.Option(help="Data sets, separated by commas.")] = "fractal,digits",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished stages in it are reused.")] = Path("tour"),
    scales: Annotated[str, typer.Option(help="Guidance scales; 1 is no guidance.")] = "1,1.5,2,3,5",
    quick: Annotated[bool, typer.Option("--quick", help="Everything in miniature, to try the machinery.")] = False,
) -> None:
    "Train and compare all five methods, no guidance and the exact model on the fractal and on real digits."
    from guidance_nb.cli._tables import summary
    from guidance_nb.cli._tour import run_tour

    names = tuple(dict.fromkeys(data.split(",")))
    table, real = run_tour(names, seeds, out, _parse_numbers("scales", scales, float), quick)
    for name in table.data.unique():
        typer.echo(f"\n{name}\n{summary(table, real, name).to_string(index=False)}")
    typer.echo(f"\nTables, figures and a page to read are in {out}: open {out / 'index.html'}")


@app.command(name="train", **_KEYS)
def _train_command(
    context: typer.Context,
    recipe: _RecipeName,
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints. Default: runs/RECIPE.")] = None,
    progress: _Progress = True,
    may_change: Annotated[str, typer.Option(help="Keys that may differ from the run that is continued.")] = "",
) -> None:
    """Train a recipe; every key of it is also a flag, such as --steps 4000 or --method.scale 1.5.

    A flag names a key in full or by its last part; guidance-nb info RECIPE lists keys, meanings and values.
    Type it again, with the same --out, and it goes on from the last checkpoint, on a CPU bit for bit.

    Example: guidance-nb train mnist-base --steps 4000 --out runs/longer
    """
    from guidance_nb.cli._devices import main_only
    from guidance_nb.cli._recipe import Recipe, read_recipe
    from guidance_nb.cli._run import train_recipe
    from guidance_nb.images._latents import read_index

    name, flags = parse_keys([recipe, *context.args], Recipe)
    chosen: Recipe = read_recipe(name, flags)
    folder = out or Path("runs") / Path(name).stem
    if chosen.latents is not None:
        read_index(chosen.latents)
        main_only(lambda: _show_cost(chosen, (), "h100", 0.35))
    _train(train_recipe(chosen, folder, progress, _split(may_change)), f"checkpoints are in {folder}")


@app.command(name="encode", cls=_Command)
def _encode_command(
    source: Annotated[str, typer.Argument(help="A folder with one sub-folder per class, mnist or cifar10.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; finished shards in it are kept.")],
    vae: Annotated[str, typer.Option(help="Folder or name of a diffusers AutoencoderKL.")],
    size: Annotated[str, typer.Option(help="Side to crop and resize to, or HEIGHT,WIDTH; 0 keeps theirs.")] = "0",
    flip: Annotated[bool, typer.Option(help="Encode the mirror image of each picture, too.")] = True,
    shard_rows: Annotated[int, typer.Option(help="Pictures of a shard.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 32,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="How latents are stored.")] = "float32",
    crop: Annotated[Literal["adm", "torchvision"], typer.Option(help="Whose way to crop and resize.")] = "adm",
    split: _Split = "train",
    progress: _Progress = True,
) -> None:
    """Encode pictures into shards of latents, which recipes read as --source latents:FOLDER.

    Type it again and it goes on with the first missing shard; damaged shards are made anew.

    Example: guidance-nb encode imagenet/train latents-256 --vae stabilityai/sd-vae-ft-ema --size 256
    """
    from guidance_nb.cli._devices import main_only
    from guidance_nb.cli._recipe import DataTable
    from guidance_nb.images._latents import encode_folder

    sides = DataTable().changed(size=size).size or None
    main_only(lambda: str(check_folder("out", out if out.exists() else out.parent)))
    index = encode_folder(source, out, vae, sides, flip, shard_rows, batch_size, dtype, crop, split, progress)
    pictures, shards = index["settings"]["pictures"], len(index["shards"])
    _tell(f"{pictures} pictures in {shards} shards: {out}; train on them with --source latents:{out}")


def _show_cost(recipe: "Recipe", gpus: tuple[int, ...], chip: str, share: float) -> None:
    "Print what a `recipe` will take on so many `gpus` of a kind `chip`, at an assumed `share` of their peak."
    from guidance_nb.cli._run import recipe_cost

    sheet = recipe_cost(recipe, gpus, chip, share)
    typer.echo(f"an estimate, at {share:.0%} of the peak of {chip} GPUs:")
    typer.echo(sheet.to_string(index=False, float_format=lambda value: f"{value:.4g}"))


@app.command(name="cost", **_KEYS)
def _cost(
    context: typer.Context,
    recipe: _RecipeName,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, separated by commas. Default: 1,8.")] = "",
    chip: Annotated[str, typer.Option(help="Their kind, such as h100 or a100.")] = "h100",
    share: Annotated[float, typer.Option(help="Share of the peak that is assumed to be reached.")] = 0.35,
) -> None:
    """Say what training a recipe will take: operations, GPU-hours, memory; every key is also a flag, as for train.

    Nothing is trained: the network is counted without memory for its weights. Communication is not in it.

    Example: guidance-nb cost sit-xl2-256-mg --gpus 8,64
    """
    from guidance_nb.cli._recipe import Recipe, read_recipe

    name, flags = parse_keys([recipe, *context.args], Recipe)
    _show_cost(read_recipe(name, flags), _parse_numbers("gpus", gpus, int), chip, share)


@app.command(name="finetune", **_KEYS)
def _finetune_command(
    context: typer.Context,
    recipe: _RecipeName,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/RECIPE.")] = None,
    progress: _Progress = True,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU although there is an accelerator.")] = False,
) -> None:
    """Fine-tune a Stable Diffusion pipeline on captioned pictures; every key of the recipe is also a flag.

    Writes an ordinary diffusers pipeline. Type it again, with the same --out, and it goes on where it was.

    Example: guidance-nb finetune sd15-aligned --data my-pictures --pipeline my-pipeline
    """
    from guidance_nb.cli._recipe import FineTuning, read_recipe
    from guidance_nb.interop._stable_diffusion import finetune

    name, flags = parse_keys([recipe, *context.args], FineTuning)
    folder = out or Path("runs") / Path(name).stem
    chosen = read_recipe(name, flags, FineTuning)
    _train(finetune(chosen, folder, progress, cpu), f"the pipeline is in {folder / 'pipeline'}")


def _store(out: Path, file: "SampleFile", overwrite: bool, columns: int) -> None:
    "Write samples as `out` says, a picture with so many `columns` for a .png, and tell."
    from guidance_nb.cli._run import _write_picture
    from guidance_nb.images._data import from_uint8, save_samples

    if out.suffix.lower() == ".png":
        _write_picture(from_uint8(file.x), out, columns)
    else:
        save_samples(out, file.x, file.c, file.facts, overwrite=overwrite)
    rate = len(file.x) / max(file.facts["seconds"], 1e-9)
    typer.echo(f"{len(file.x)} samples, NFE {file.facts['nfe']:g}, {rate:.3g} a second: {out}")


@app.command(name="sample", **_KEYS)
def _sample_command(
    context: typer.Context,
    checkpoint: _Checkpoint,
    out: _SampleOut = Path("samples.npz"),
    classifier: _Classifier = None,
    ema: Annotated[bool, typer.Option(help="Sample the moving average of the weights.")] = True,
    overwrite: _Overwrite = False,
    progress: _Progress = True,
) -> None:
    """Draw samples from a trained model at a guidance scale, with the facts of their making.

    How the scale acts follows from the method of the checkpoint; sampler and steps are the recipe's unless given.

    Example: guidance-nb sample mnist-cfg --scale 3 --out digits.png
    """
    from guidance_nb.cli._devices import main_only
    from guidance_nb.cli._run import Request, _check_target, generate, load_trained

    source, flags = parse_keys([checkpoint, *context.args], Request)
    request = Request().changed(**flags)
    main_only(lambda: _check_target(out, overwrite))
    trained, guide = load_trained(source, ema), load_trained(classifier) if classifier else None
    columns = max(1, min(10, len(trained.classes)))
    if out.suffix.lower() == ".png" and "n" not in flags:
        request = request.changed(n=10 * columns)
    file = generate(trained, request, guide, progress)
    main_only(lambda: _store(out, file, overwrite, columns))


@app.command(name="postprocess", cls=_Command)
def _postprocess_command(
    checkpoint: _Checkpoint,
    samples: _Samples,
    out: _SampleOut = Path("corrected.npz"),
    steps: Annotated[int, typer.Option(help="Steps of the correction.")] = 8,
    sampler: Annotated[str, typer.Option(help="euler, heun or dopri5.")] = "heun",
    scale: Annotated[float, typer.Option(help="Guidance scale of the correction itself; 1 is none.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Images at a time; changes no sample.")] = 256,
    overwrite: _Overwrite = False,
    progress: _Progress = True,
) -> None:
    """Correct samples, ours or anybody's, with a trained postprocessing flow.

    Train one first: guidance-nb train mnist-post --samples base.npz

    Example: guidance-nb postprocess runs/mnist-post base.npz --out corrected.npz
    """
    from guidance_nb.cli._devices import main_only
    from guidance_nb.cli._run import _check_target, load_trained, postprocess
    from guidance_nb.images._data import load_samples

    def work() -> None:
        _check_target(out, overwrite)
        trained = load_trained(checkpoint)
        file = load_samples(samples, size=(trained.shape[1], trained.shape[2]), channels=trained.shape[0])
        _store(out, postprocess(trained, file, steps, sampler, scale, batch_size, progress), overwrite, 10)

    main_only(work)


@app.command(name="evaluate", cls=_Command)
def _evaluate_command(
    samples: _Samples,
    reference: _RealData = "mnist",
    features: _FeatureExtractor = "inception-v3-compat",
    metrics: Annotated[str, typer.Option(help="Such as fid,is; fd,kd for other features. Default: usual ones.")] = "",
    split: _Split = "train",
    weights: _Weights = None,
    rows: Annotated[Path | None, typer.Option(help="Table to append the row to.")] = None,
    progress: _Progress = True,
) -> None:
    """Score samples against real images, and say how real images themselves score.

    FID belongs to Inception; other features give a Fréchet distance with their name, such as fd_resnet56.

    Example: guidance-nb evaluate base.npz --features runs/mnist-evaluation-classifier --rows rows.csv
    """
    from guidance_nb.cli._devices import main_only
    from guidance_nb.cli._evaluation import baseline_row, extract_reference_features, find_feature_extractor, score
    from guidance_nb.engine._sampling import extract_sharded
    from guidance_nb.images._data import load_samples
    from guidance_nb.images._metrics import append_rows

    wanted = _split(metrics) or None
    if rows is not None:
        main_only(lambda: str(check_folder("rows", rows.parent)))
    file, extractor = load_samples(samples), find_feature_extractor(features, weights, wanted)
    shape = tuple(file.x.shape[1:])
    real, names = extract_reference_features(reference, split, shape, extractor, wanted, "", progress)
    found = extract_sharded(file.x, extractor, "samples", 256, progress)

    def finish() -> None:
        row = score(file, real, extractor, names, features=found)
        if rows is not None:
            append_rows(rows, [row])
        _show_row(row)
        if (baseline := baseline_row(reference, real, extractor, len(file.x), names)) is not None:
            _show_row(baseline)

    main_only(finish)


@app.command(name="sweep", **_KEYS)
def _sweep_command(
    context: typer.Context,
    checkpoint: _Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder for table and curves; finished points are kept.")] = Path("sweep"),
    scales: Annotated[str, typer.Option(help="Guidance scales; 1 is none.")] = "1,1.5,2,3,4",
    steps: Annotated[str, typer.Option(help="Numbers of steps. Default: the recipe's.")] = "",
    samplers: Annotated[str, typer.Option(help="Samplers. Default: the recipe's.")] = "",
    reference: _RealData = "mnist",
    split: _Split = "train",
    features: _FeatureExtractor = "inception-v3-compat",
    weights: _Weights = None,
    classifier: _Classifier = None,
    correction: Annotated[str | None, typer.Option(help="Score corrected samples, too, by this checkpoint.")] = None,
    best: Annotated[str, typer.Option(help="Column that picks the best point. Default: the Fréchet distance.")] = "",
    progress: _Progress = True,
) -> None:
    """Score a model over scales, steps and samplers: a table, its curves, and the best point.

    Type it again and it goes on with the first missing point.

    Example: guidance-nb sweep runs/mnist-base --features runs/mnist-evaluation-classifier --n 5000
    """
    from guidance_nb.cli import _evaluation as evaluation
    from guidance_nb.cli._devices import is_main, main_only
    from guidance_nb.cli._run import Request, _complete_request, load_trained
    from guidance_nb.images._metrics import column

    source, flags = parse_keys([checkpoint, *context.args], Request)
    asked = _parse_numbers("scales", scales, float), _parse_numbers("steps", steps, int), _split(samplers)
    points = evaluation.sweep_points(Request().changed(**flags), *asked)
    main_only(lambda: str(check_folder("out", out)))
    trained, extractor = load_trained(source), evaluation.find_feature_extractor(features, weights)
    guide, repair = (load_trained(name) if name else None for name in (classifier, correction))
    for point in points:
        _complete_request(trained, point, guide)
    best = best or column("fd", extractor.name)
    real, metrics = evaluation.extract_reference_features(
        reference, split, trained.image_shape, extractor, best=best, progress=progress
    )
    for row in evaluation.sweep(trained, points, real, extractor, out, guide, repair, progress, reference, metrics):
        _show_row(row)
    if is_main():
        same = {"checkpoint": trained.path, "extractor": real.extractor, "reference_checksum": real.checksum}
        found = evaluation.finish_sweep(out, best, same)
        typer.echo(f"\nbest point by {best}:")
        _show_row(found)


@app.command(name="info", cls=_Command)
def _info(
    source: Annotated[str, typer.Argument(help="A checkpoint, run, model, recipe, sample file or folder of latents.")],
) -> None:
    """Say what a checkpoint, recipe, sample file or folder of latents is and how it was made.

    A recipe is printed in full as a TOML file, each key with its meaning: a beginning for one of your own.

    Example: guidance-nb info mnist-base
    """
    from guidance_nb.cli._load import _model_names
    from guidance_nb.cli._recipe import FineTuning, Recipe, Table, describe_recipe, read_recipe, recipe_names
    from guidance_nb.cli._run import load_trained
    from guidance_nb.images._data import load_samples
    from guidance_nb.images._latents import INDEX, read_index

    path = Path(source)
    unknown = not path.exists() and source not in _model_names()
    if source in recipe_names() or path.suffix.lower() == ".toml" or unknown:
        kind: type[Table] = FineTuning if source in recipe_names(FineTuning) else Recipe
        typer.echo(describe_recipe(read_recipe(source, kind=kind)))
    elif (path / INDEX).is_file():
        index = read_index(path)
        typer.echo(f"latents of {index['settings']['pictures']} pictures in {len(index['shards'])} shards")
        facts = {key: index[key] for key in ("name", "settings", "vae")}
        typer.echo(json.dumps(facts | {"classes": len(index["classes"])}, indent=1))
    elif path.suffix.lower() == ".npz" or (path / "facts.json").is_file():
        file = load_samples(path)
        typer.echo(f"{len(file.x)} samples of shape {tuple(file.x.shape[1:])}, {'no ' if file.c is None else ''}labels")
        typer.echo(json.dumps(file.facts, indent=1))
    else:
        trained = load_trained(path)
        classes, size = trained.classes, "x".join(map(str, trained.shape))
        if trained.latents is not None:
            size = f"{'x'.join(map(str, trained.image_shape))} from latents {size}"
        weights = sum(p.numel() for p in trained.model.parameters())
        typer.echo(f"{trained.path}: {trained.recipe.title or trained.recipe.method.name}")
        typer.echo(f"step {trained.step} of {trained.recipe.training.steps}, {weights:,} weights, images {size}")
        typer.echo(f"{len(classes)} classes: {', '.join(classes[:10])}{', ...' * (len(classes) > 10)}\n")
        typer.echo(describe_recipe(trained.recipe))


@app.command(name="models", cls=_Command)
def _models() -> None:
    """List the trained models that come with the package, each with what it is and how large.

    Example: guidance-nb models
    """
    from guidance_nb.cli._load import MODELS, _model_names

    for name in _model_names():
        title = json.loads((MODELS / name / "checkpoint.json").read_text())["metadata"]["recipe"]["title"]
        size = sum(file.stat().st_size for file in (MODELS / name).iterdir()) / 1e6
        typer.echo(f"{name:24} {size:4.1f} MB  {title.split(';')[0]}")


def _show_row(row: Json) -> None:
    "Print the metrics of a `row` of a table, and what it takes to read them, in the main process."
    from guidance_nb.cli._evaluation import is_metric

    keys = ("method", "scale", "sampler", "steps", "n", "reference", "nfe", "correction")
    shown = {key: row[key] for key in keys if row.get(key) not in (None, "", 0) and row[key] == row[key]}
    facts = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
    values = [f"{key} {value:.4g}" for key, value in row.items() if is_metric(key) and value == value]
    _tell(f"{', '.join(values)}\n  ({', '.join(facts)})")


def _in_one_line(error: Exception) -> str:
    "One line about an error that a user can correct; nothing about any other."
    if isinstance(error, MemoryError):
        return f"out of memory ({error or 'while loading'}); allow more, or close other programs"
    if isinstance(error, ValueError | FloatingPointError | OverflowError | OSError | ImportError):
        return " ".join(str(error).split()) or type(error).__name__
    reason = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, RuntimeError) and ("out of memory" in reason or "allocate memory" in reason):  # torch's
        return reason if "allowed: " in reason else f"out of memory ({reason}); lower the batch size"
    return error.format_message() if hasattr(error, "format_message") else ""  # of click: the help, where it is asked


def main() -> None:
    "Run the command line; exit code 2 and one line for bad input."
    message, code = "", 2
    try:
        code = app(standalone_mode=False) or 0
    except typer.Abort:
        code = 130
    except Exception as error:
        message = _in_one_line(error)
        if not message:
            raise
    if code == 130:
        message = "interrupted; what is finished is kept, start again to go on"
    if message:
        typer.echo(message if "\n" in message else f"guidance-nb: {message}", err=True)
    if "torch.distributed" in sys.modules and (message or not code):
        from guidance_nb._processes import destroy_process_group

        destroy_process_group(failed=bool(message))  # others may still wait for one that failed
    sys.exit(code)
