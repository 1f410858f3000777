"""`guidance-nb`: thin commands over the functions of the notebooks."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperCommand

from guidance_nb import __version__
from guidance_nb.cli.recipes import (
    Recipe,
    Request,
    baseline_row,
    check_folder,
    check_recipe,
    complete_request,
    describe_recipe,
    describe_trained,
    draw,
    extract_reference_features,
    find_feature_extractor,
    find_key,
    finish_sweep,
    is_main,
    is_metric,
    latent_folder,
    load_trained,
    main_only,
    point_facts,
    postprocess,
    read_recipe,
    recipe_cost,
    recipe_names,
    score,
    sweep,
    sweep_points,
    train_recipe,
)
from guidance_nb.comparison import run_tour, summary
from guidance_nb.engine.sampling import extract_sharded
from guidance_nb.images.data import SampleFile, load_samples, may_replace, save_samples
from guidance_nb.images.features import INCEPTION
from guidance_nb.images.latents import INDEX, encode_folder, read_index
from guidance_nb.images.metrics import append_rows, column
from guidance_nb.interop.stable_diffusion import finetune, finetuning_key, finetuning_names, read_finetuning

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


def show_version(wanted: bool) -> None:
    "Print the version and stop, if that is `wanted`."
    if wanted:
        typer.echo(f"guidance-nb {__version__}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it and stop.")
    ] = False,
) -> None:
    "Guidance in diffusion and flow models: learn, compare and use five methods."


def parse_scales(
    text: str,  # Numbers separated by commas
) -> tuple[float, ...]:  # The scales
    "Read a list of scales."
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"scales = {text!r}; allowed: numbers separated by commas, such as 1,2,3") from None


@app.command()
def tour(
    data: Annotated[str, typer.Option(help="Data sets, separated by commas.")] = "fractal,digits",
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished stages in it are reused.")] = Path("tour"),
    scales: Annotated[str, typer.Option(help="Guidance scales; 1 is no guidance.")] = "1,1.5,2,3,5",
    quick: Annotated[bool, typer.Option("--quick", help="Everything in miniature, to try the machinery.")] = False,
) -> None:
    "Train and compare all five methods, no guidance and the exact model on the fractal and on real digits."
    import pandas as pd

    try:
        table = run_tour(tuple(dict.fromkeys(data.split(","))), seeds, out, parse_scales(scales), quick)
    except KeyboardInterrupt:
        typer.echo("guidance-nb: interrupted; finished stages are kept, start again to continue", err=True)
        raise typer.Exit(130) from None
    floor = pd.read_csv(out / "baseline.csv")
    for name in table.data.unique():
        typer.echo(f"\n{name}\n{summary(table, floor, name).to_string(index=False)}")
    typer.echo(f"\nTables, figures and a page to read are in {out}: open {out / 'index.html'}")


def parse_flags(
    words: list[str],  # What follows the recipe: --key value, or --key=value
    find: Callable[[str], str] = find_key,  # The full key that a name stands for
) -> dict[str, str]:  # Values by key
    "Read flags that name keys of a recipe."
    flags: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            raise ValueError(f"unexpected {word!r}; allowed: --key value, for a key of the recipe")
        key, given, value = word[2:].partition("=")
        if not given:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ValueError(f"{word} has no value; allowed: {word} value")
        flags[find(key)] = value
    return flags


class RecipeCommand(TyperCommand):
    "A command whose help ends with the recipes that there are, read when somebody asks."

    def format_help(self, ctx: Any, formatter: Any) -> None:
        "Write the help."
        known = [(name, read_recipe(name).title) for name in recipe_names()]
        self.epilog = "\n\n".join(["Recipes:", *(f"{name}: {title}." for name, title in known)])
        super().format_help(ctx, formatter)


Split = Annotated[str, typer.Option(help="train or test, of mnist and cifar10.")]


def interrupted(
    advice: str,  # What is kept, and what to do
) -> typer.Exit:  # To raise
    "Say what an interruption leaves."
    typer.echo(f"guidance-nb: interrupted; {advice}", err=True)
    return typer.Exit(130)


@app.command(
    name="train", cls=RecipeCommand, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def train_command(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe by name, or a TOML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints. Default: runs/RECIPE.")] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a recipe; every key of it is also a flag, such as --steps 4000 or --method.scale 1.5.

    A flag names a key in full or by its last part; guidance-nb info RECIPE lists keys, meanings and values.
    Type it again, with the same --out, and it goes on from the last checkpoint, on a CPU bit for bit.

    Example: guidance-nb train mnist-base --steps 4000 --out runs/longer
    """
    if recipe.startswith("-"):
        raise ValueError(f"recipe = {recipe!r}; allowed: a name or file first, then flags")
    chosen = read_recipe(recipe, parse_flags(context.args))
    folder = out or Path("runs") / Path(recipe).stem
    if (latents := latent_folder(chosen)) is not None:
        check_recipe(chosen)
        read_index(latents)
        main_only(lambda: show_cost(chosen, (), "h100", 0.35))
    try:
        for state in train_recipe(chosen, folder, progress):
            last = state
    except KeyboardInterrupt:
        raise interrupted("start again to go on from the last checkpoint") from None
    if is_main():
        typer.echo(f"{last.step} steps done, loss {last.loss:.4g}; checkpoints are in {folder}")


@app.command(name="encode")
def encode_command(
    source: Annotated[str, typer.Argument(help="A folder with one sub-folder per class, mnist or cifar10.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; finished shards in it are kept.")],
    vae: Annotated[str, typer.Option(help="Folder or name of a diffusers AutoencoderKL.")],
    size: Annotated[int | None, typer.Option(help="Side of the square to crop and resize to.")] = None,
    flip: Annotated[bool, typer.Option(help="Encode the mirror image of each picture, too.")] = True,
    shard_rows: Annotated[int, typer.Option(help="Pictures of a shard.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 32,
    dtype: Annotated[str, typer.Option(help="How latents are stored: float32 or float16.")] = "float32",
    crop: Annotated[str, typer.Option(help="adm, or torchvision: Resize and CenterCrop.")] = "adm",
    split: Split = "train",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Encode pictures into shards of latents, which recipes read as --source latents:FOLDER.

    Type it again and it goes on with the first missing shard; damaged shards are made anew.

    Example: guidance-nb encode imagenet/train latents-256 --vae stabilityai/sd-vae-ft-ema --size 256
    """
    main_only(lambda: str(check_folder("out", out if out.exists() else out.parent)))
    try:
        index = encode_folder(source, out, vae, size, flip, shard_rows, batch_size, dtype, crop, split, progress)
    except KeyboardInterrupt:
        raise interrupted("finished shards are kept, start again to go on") from None
    if is_main():
        shards, pictures = len(index["shards"]), index["settings"]["pictures"]
        typer.echo(f"{pictures} pictures in {shards} shards: {out}; train on them with --source latents:{out}")


def show_cost(
    recipe: Recipe,  # A recipe that trains a denoiser
    gpus: tuple[int, ...],  # Numbers of GPUs; none takes those of recipe_cost
    chip: str,  # Their kind
    share: float,  # Assumed share of the peak
) -> None:
    "Print what a run will take."
    sheet = recipe_cost(recipe, gpus, chip, share)
    typer.echo(f"an estimate, at {share:.0%} of the peak of {chip} GPUs:")
    typer.echo(sheet.to_string(index=False, float_format=lambda value: f"{value:.4g}"))


@app.command(cls=RecipeCommand, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def cost(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe by name, or a TOML file.")],
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, separated by commas. Default: 1,8.")] = "",
    chip: Annotated[str, typer.Option(help="Their kind, such as h100 or a100.")] = "h100",
    share: Annotated[float, typer.Option(help="Share of the peak that is assumed to be reached.")] = 0.35,
) -> None:
    """Say what training a recipe will take: operations, GPU-hours, memory; every key is also a flag, as for train.

    Nothing is trained: the network is counted without memory for its weights. Communication is not in it.

    Example: guidance-nb cost sit-xl2-256-mg --gpus 8,64
    """
    chosen = read_recipe(recipe, parse_flags(context.args))
    check_recipe(chosen)
    show_cost(chosen, parse_counts("gpus", gpus), chip, share)


@app.command(name="finetune", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def finetune_command(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help=f"A TOML file, or one of {', '.join(finetuning_names())}.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/RECIPE.")] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU although there is an accelerator.")] = False,
) -> None:
    """Fine-tune a Stable Diffusion pipeline on captioned pictures; every key of the recipe is also a flag.

    Writes an ordinary diffusers pipeline. Type it again, with the same --out, and it goes on where it was.

    Example: guidance-nb finetune sd15-aligned --data my-pictures --pipeline my-pipeline
    """
    if recipe.startswith("-"):
        raise ValueError(f"recipe = {recipe!r}; allowed: a name or file first, then flags")
    chosen = read_finetuning(recipe, parse_flags(context.args, finetuning_key))
    folder = out or Path("runs") / Path(recipe).stem
    try:
        for state in finetune(chosen, folder, progress, cpu):
            last = state
    except KeyboardInterrupt:
        raise interrupted("start again to go on from the last checkpoint") from None
    if is_main():
        typer.echo(f"{last.step} steps done, loss {last.loss:.4g}; the pipeline is in {folder / 'pipeline'}")


Checkpoint = Annotated[str, typer.Argument(help="A checkpoint, or the folder of a run.")]
Scale = Annotated[float | None, typer.Option(help="Guidance scale; 1 is none. Default: the recipe's.")]
Classifier = Annotated[
    str | None, typer.Option(help="Guide by this classifier checkpoint instead of by the null label.")
]
Count = Annotated[int, typer.Option("--n", help="Number of samples.")]
Labels = Annotated[str, typer.Option(help="'balanced', or classes separated by commas, in turn.")]
Seed = Annotated[int, typer.Option(help="Seed; sample i depends on (seed, i) alone.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 where the hardware is made for it.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the network first.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time; changes no sample.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace samples that are there.")]
Samples = Annotated[str, typer.Argument(help="Samples of any origin: .npz, or a folder of images.")]


Eyes = Annotated[str, typer.Option("--eyes", help="inception-v3-compat, resnet20, resnet56, or a judge checkpoint.")]
Weights = Annotated[str | None, typer.Option(help="Local file with the weights of a named network.")]
RealData = Annotated[
    str,
    typer.Option(
        "--reference",
        help="mnist, cifar10, images (.npz, or a folder, brought to the samples' size), or ADM statistics.",
    ),
]
SweepFolder = Annotated[Path, typer.Option(help="Folder for rows.csv and curves.png; finished points are kept.")]
Correction = Annotated[str | None, typer.Option(help="Score corrected samples, too, by this checkpoint.")]
Best = Annotated[str, typer.Option(help="Column that picks the best point. Default: the Fréchet distance.")]


def check_target(
    out: Path,  # File or folder to write
    overwrite: bool,  # Whether it may be there
) -> None:
    "Refuse a name that cannot be written, or something that must not be replaced, before any work is done."
    if out.suffix.lower() in (".npy", ".pt", ".zip", ".png", ".jpg", ".jpeg", ".webp", ".safetensors"):
        raise ValueError(f"out = {str(out)!r}; allowed: a name that ends in .npz, or a folder")
    if out.exists() and not overwrite:
        raise ValueError(f"out = {str(out)!r} is there already; allowed: another name, or --overwrite")
    if out.exists() and (out.is_dir() == (out.suffix == ".npz") or not may_replace(out, True)):
        raise ValueError(f"out = {str(out)!r} holds other things than samples; allowed: another name")
    check_folder("out", out.parent)


def store(
    out: Path,  # File or folder to write
    file: SampleFile,  # Samples
    overwrite: bool,  # Whether it may be there
) -> None:
    "Write samples and say so."
    save_samples(out, file.x, file.c, file.facts, overwrite=overwrite)
    rate = len(file.x) / max(file.facts["seconds"], 1e-9)
    cost = f"{file.facts['nfe']:g} network rows each, {rate:.3g} a second"
    typer.echo(f"{len(file.x)} samples, {cost}: {out}")


def parse_interval(
    text: str,  # Two numbers separated by a comma
) -> tuple[float, float]:  # First and last time
    "Read an interval of times."
    parts = text.split(",")
    try:
        first, last = float(parts[0]), float(parts[-1])
    except ValueError:
        parts = []
    if len(parts) != 2:
        raise ValueError(f"interval = {text!r}; allowed: two times separated by a comma, such as 0,0.75")
    return first, last


def parse_counts(
    name: str,  # Name of the option, for the message
    text: str,  # Whole numbers separated by commas, or nothing
) -> tuple[int, ...]:  # The numbers
    "Read a list of whole numbers."
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"{name} = {text!r}; allowed: whole numbers separated by commas, such as 10,20") from None


@app.command(name="sample")
def sample_command(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="An .npz file, or a folder for PNGs.")] = Path("samples.npz"),
    n: Count = 1000,
    scale: Scale = None,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, euler, heun, euler_maruyama, dpmpp_2m, dopri5.")] = "",
    steps: Annotated[int, typer.Option(help="Steps of the sampler. Default: the recipe's.")] = 0,
    seed: Seed = 0,
    labels: Labels = "balanced",
    interval: Annotated[str, typer.Option(help="First and last time that is guided.")] = "0,1",
    classifier: Classifier = None,
    precision: Precision = "fp32",
    compile: Compile = False,
    batch_size: BatchSize = 256,
    ema: Annotated[bool, typer.Option(help="Sample the moving average of the weights.")] = True,
    channels: Annotated[int | None, typer.Option(help="Guide the first channels only, 3 as DiT's code.")] = None,
    vae: Annotated[str, typer.Option(help="For latents: the autoencoder that decodes. Default: the recipe's.")] = "",
    overwrite: Overwrite = False,
    progress: Progress = True,
) -> None:
    """Draw samples from a trained model at a guidance scale, with the facts of their making.

    How the scale acts follows from the method of the checkpoint; sampler and steps are the recipe's unless given.

    Example: guidance-nb sample runs/mnist-base --scale 2 --n 10000 --out base.npz
    """
    times = parse_interval(interval)
    main_only(lambda: check_target(out, overwrite))
    request = Request(n, labels, scale, sampler, steps, seed, times, precision, compile, batch_size, channels, vae)
    guide = load_trained(classifier) if classifier else None
    file = draw(load_trained(checkpoint, ema), request, guide, progress)
    main_only(lambda: store(out, file, overwrite))


@app.command(name="postprocess")
def postprocess_command(
    checkpoint: Checkpoint,
    samples: Samples,
    out: Annotated[Path, typer.Option(help="An .npz file, or a folder for PNGs.")] = Path("corrected.npz"),
    steps: Annotated[int, typer.Option(help="Steps of the correction.")] = 8,
    sampler: Annotated[str, typer.Option(help="euler, heun or dopri5.")] = "heun",
    scale: Annotated[float, typer.Option(help="Guidance scale of the correction itself; 1 is none.")] = 1.0,
    batch_size: BatchSize = 256,
    overwrite: Overwrite = False,
    progress: Progress = True,
) -> None:
    """Correct samples, ours or anybody's, with a trained postprocessing flow.

    Train one first: guidance-nb train mnist-post --samples base.npz

    Example: guidance-nb postprocess runs/mnist-post base.npz --out corrected.npz
    """

    def work() -> None:
        check_target(out, overwrite)
        trained = load_trained(checkpoint)
        file = load_samples(samples, size=trained.shape[-1], channels=trained.shape[0])
        store(out, postprocess(trained, file, steps, sampler, scale, batch_size, progress), overwrite)

    main_only(work)


@app.command(name="evaluate")
def evaluate_command(
    samples: Samples,
    reference: RealData = "mnist",
    eyes: Eyes = INCEPTION,
    metrics: Annotated[
        str, typer.Option(help="Such as fid,is,precision; fd,kd for other eyes. Default: all usual ones.")
    ] = "",
    split: Split = "train",
    weights: Weights = None,
    rows: Annotated[Path | None, typer.Option(help="Table to append the row to.")] = None,
    progress: Progress = True,
) -> None:
    """Score samples against real images, and say how real images themselves score.

    FID belongs to Inception; other eyes give a Fréchet distance that carries their name, such as fd_judge.

    Example: guidance-nb evaluate base.npz --reference mnist --eyes runs/mnist-judge --rows rows.csv
    """
    wanted = tuple(metrics.split(",")) if metrics else None
    if rows is not None:
        main_only(lambda: str(check_folder("rows", rows.parent)))
    score_file(samples, reference, eyes, wanted, split, weights, rows, progress)


def score_file(
    samples: str,  # An .npz file, or a folder of images
    reference: str,  # See load_real
    eyes: str,  # See find_feature_extractor
    metrics: tuple[str, ...] | None,  # Names, or all usual ones
    split: str,  # "train" or "test"
    weights: str | None,  # Local file with the weights of a named network
    rows: Path | None,  # Table to append the row to
    progress: bool,  # Whether to show a progress bar
) -> None:
    "Score a file, on all processes if there are several, write its row, and print it with that of real images."
    file, look = load_samples(samples), find_feature_extractor(eyes, weights, metrics)
    real, names = extract_reference_features(reference, split, tuple(file.x.shape[1:]), look, metrics, "", progress)
    seen = extract_sharded(file.x, look, "samples", 256, progress)

    def finish() -> None:
        row = score(file, real, look, names, seen=seen)
        if rows is not None:
            append_rows(rows, [row])
        show_row(row)
        if (floor := baseline_row(reference, real, look, len(file.x), names)) is not None:
            show_row(floor)

    main_only(finish)


@app.command(name="sweep")
def sweep_command(
    checkpoint: Checkpoint,
    out: SweepFolder = Path("sweep"),
    scales: Annotated[str, typer.Option(help="Guidance scales; 1 is none.")] = "1,1.5,2,3,4",
    steps: Annotated[str, typer.Option(help="Numbers of steps. Default: the recipe's.")] = "",
    samplers: Annotated[str, typer.Option(help="Samplers. Default: the recipe's.")] = "",
    n: Count = 1000,
    seed: Seed = 0,
    labels: Labels = "balanced",
    reference: RealData = "mnist",
    split: Split = "train",
    eyes: Eyes = INCEPTION,
    weights: Weights = None,
    classifier: Classifier = None,
    correction: Correction = None,
    best: Best = "",
    precision: Precision = "fp32",
    compile: Compile = False,
    batch_size: BatchSize = 256,
    progress: Progress = True,
) -> None:
    """Score a model over scales, steps and samplers: a table, its curves, and the best point.

    Type it again and it goes on with the first missing point.

    Example: guidance-nb sweep runs/mnist-base --scales 1,1.5,2,3 --eyes runs/mnist-judge --n 5000
    """
    request = Request(n, labels, None, "", 0, seed, (0.0, 1.0), precision, compile, batch_size)
    names = tuple(samplers.split(",")) if samplers else ()
    points = sweep_points(request, parse_scales(scales), parse_counts("steps", steps), names)
    others = {"classifier": classifier, "correction": correction, "weights": weights}
    try:
        run_sweep(checkpoint, points, out, (reference, split), eyes, others, best, progress)
    except KeyboardInterrupt:
        raise interrupted("finished points are kept, start again to go on") from None


def run_sweep(
    checkpoint: str,  # A trained denoiser
    points: list[Request],  # See sweep_points
    out: Path,  # Folder for rows.csv and curves.png
    real: tuple[str, str],  # See load_real: where real images come from, and their split
    eyes: str,  # See find_feature_extractor
    others: dict[str, str | None],  # Checkpoints "classifier" and "correction", and the "weights" of the eyes
    best: str,  # Column that picks the best point
    progress: bool,  # Whether to show progress bars
) -> None:
    "Check everything, look at the real images, sweep, and print rows and the best point."
    main_only(lambda: str(check_folder("out", out)))
    trained, look = load_trained(checkpoint), find_feature_extractor(eyes, others["weights"])
    guide, repair = (load_trained(name) if (name := others[key]) else None for key in ("classifier", "correction"))
    points = [complete_request(trained, point, guide) for point in points]
    best = best or column("fd", look.name)
    seen, metrics = extract_reference_features(*real, trained.image_shape, look, None, best, progress)
    for row in sweep(trained, points, seen, look, out, guide, repair, progress, real[0], metrics):
        if is_main():
            show_row(row)
    if is_main():
        same = point_facts(trained, points[0], seen, guide)
        found = finish_sweep(out, best, {key: same[key] for key in ("checkpoint", "extractor", "reference_checksum")})
        typer.echo(f"\nbest point by {best}:")
        show_row(found)


@app.command()
def info(
    source: Annotated[
        str, typer.Argument(help="A checkpoint, the folder of a run, a recipe, a sample file, or a folder of latents.")
    ],
) -> None:
    """Say what a checkpoint, recipe, sample file or folder of latents is and how it was made.

    A recipe is printed in full as a TOML file, each key with its meaning: a beginning for one of your own.

    Example: guidance-nb info mnist-base
    """
    path = Path(source)
    if source in finetuning_names():
        table = asdict(read_finetuning(source))
        typer.echo("\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items()))
    elif source in recipe_names() or path.suffix == ".toml" or not path.exists():
        typer.echo(describe_recipe(read_recipe(source)))
    elif (path / INDEX).is_file():
        index = read_index(path)
        typer.echo(f"latents of {index['settings']['pictures']} pictures in {len(index['shards'])} shards")
        facts = {key: index[key] for key in ("name", "settings", "vae")}
        typer.echo(json.dumps(facts | {"classes": len(index["classes"])}, indent=1))
    elif path.suffix == ".npz" or (path / "facts.json").is_file():
        file = load_samples(path)
        typer.echo(f"{len(file.x)} samples of shape {tuple(file.x.shape[1:])}, {'no ' if file.c is None else ''}labels")
        typer.echo(json.dumps(file.facts, indent=1))
    else:
        typer.echo(describe_trained(load_trained(path)))


def show_row(
    row: dict[str, Any],  # A row of a table
) -> None:
    "Print the metrics of a row, and what it takes to read them."
    keys = ("method", "scale", "sampler", "steps", "n", "reference", "nfe", "correction")
    shown = {key: row[key] for key in keys if row.get(key) not in (None, "", 0) and row[key] == row[key]}
    facts = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
    values = [f"{key} {value:.4g}" for key, value in row.items() if is_metric(key) and value == value]
    typer.echo(f"{', '.join(values)}\n  ({', '.join(facts)})")


def destroy_process_group(
    failed: bool = False,  # Whether others may still wait for this one, as NCCL would at parting
) -> None:
    "Part from the other processes, if there are any: threads of theirs that outlive Python can abort it at its end."
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and (not failed or torch.distributed.get_backend() == "gloo"):
        torch.distributed.destroy_process_group()


def main() -> None:
    "Run the command line; exit code 2 for bad input."
    try:
        app()
    except SystemExit as end:  # how a command ends, well or not
        if not end.code:
            destroy_process_group()
        raise
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        message = reason if "allowed: " in reason else f"out of memory ({reason}); lower the batch size"
    else:
        return
    typer.echo(f"guidance-nb: {message}", err=True)
    destroy_process_group(failed=True)
    sys.exit(2)
