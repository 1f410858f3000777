"Fine-tuning Stable Diffusion on a tiny random pipeline: nothing is downloaded."

import copy
import csv
import json
import shutil
from dataclasses import replace

import diffusers
import diffusers_cases
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)
from typer.testing import CliRunner

from guidance_nb._random import keyed_generator
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.cli._app import app
from guidance_nb.cli._recipe import FineTuning, override, read_recipe, recipe_names
from guidance_nb.denoisers import EMBEDDINGS, NetworkDenoiser, count_nfe
from guidance_nb.engine._run import Engine
from guidance_nb.interop._captions import cache_captioned, load_cached, load_captioned
from guidance_nb.interop._grids import clip_score, compare_scales
from guidance_nb.interop._schedulers import scheduler_times
from guidance_nb.interop._stable_diffusion import (
    add_memory_hint,
    finetune,
)
from guidance_nb.interop._text_denoiser import (
    TextDenoiser,
    TwoStageAlignedLoss,
    load_text_denoiser,
    merged_network,
    save_lora,
    save_pipeline,
)
from guidance_nb.model_guidance import FixedScale, ModelGuidanceLoss
from guidance_nb.paths import FlowPath
from guidance_nb.samplers import sample
from guidance_nb.training import DenoisingLoss, LossContext, train

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

WORDS = {"vocab_size": 54, "max_position_embeddings": 10, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def tokenizer():
    letters = [chr(i) for i in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=10)


def make_pipeline(scheduler=None, channels=4, **unet):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, scaling_factor=0.7, **blocks)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4, **unet,
    )  # fmt: skip
    scheduler = scheduler or DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    clip = CLIPTextModel(CLIPTextConfig(**TOWER, **WORDS)).eval()
    made = StableDiffusionPipeline(vae, clip, tokenizer(), net, scheduler, None, None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


CAPTIONS = ("red cat", "blue dog", "red dog")


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Nine pictures, three captions."
    root = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(9):
        x = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(x.numpy()).save(root / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": CAPTIONS[i % 3]})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


@pytest.fixture(scope="module")
def cached(pipeline, folder, tmp_path_factory):
    return cache_captioned(folder, tmp_path_factory.mktemp("cache"), pipeline, progress=False)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    "The pipeline as a folder."
    path = tmp_path_factory.mktemp("saved") / "tiny"
    pipeline.save_pretrained(str(path))
    return path


def context(seed=0):
    return LossContext(keyed_generator(seed), 0, 1, None)


def test_a_real_dataset_gives_what_its_folder_gives(folder):
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    columns = {"image": [str(folder / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    ours, theirs = load_captioned(folder), load_captioned(dataset)
    assert theirs.classes == ours.classes == CAPTIONS
    assert theirs.labels.tolist() == ours.labels.tolist() == [0, 1, 2] * 3
    assert torch.equal(theirs.images(torch.arange(9)), ours.images(torch.arange(9)))
    assert load_captioned(dataset, 8).images(torch.arange(2)).shape == (2, 3, 8, 8)
    for wide in (load_captioned(dataset, (8, 12)), load_captioned(folder, (8, 12))):
        assert wide.images(torch.arange(2)).shape == (2, *wide.shape) == (2, 3, 8, 12)
    with pytest.raises((KeyError, ValueError), match="caption"):  # by the version of datasets
        load_captioned(dataset, column="caption")
    with pytest.raises(ValueError, match=r"picture 0 of dataset .* cannot be read .*; allowed: pictures in 'photo'"):
        load_captioned(dataset, pictures="photo")
    gap = datasets.Dataset.from_dict({**columns, "text": [*columns["text"][:-1], " "]})
    with pytest.raises(ValueError, match=r"picture 8 of dataset .* has no caption; allowed: 'text'"):
        load_captioned(gap)
    unlike = [Image.new("RGB", (16, 16)), Image.new("RGB", (16, 20))]
    mixed = load_captioned(datasets.Dataset.from_dict({"image": unlike, "text": ["a", "b"]}))
    with pytest.raises(RuntimeError, match=r"stack expects each tensor to be equal size.* \[3, 20, 16\] at entry 1"):
        mixed.images(torch.arange(2))


def test_bad_folders_are_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has no caption; allowed: a\.txt"):
        load_captioned(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.png has no caption"):
        load_captioned(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png"\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl row 2 names no picture \(Expecting"):
        load_captioned(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ValueError, match=r"row 1 names no picture .'file_name'.; allowed: a file_name in every row"):
        load_captioned(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"one, two\nthree"\n')
    assert load_captioned(tmp_path).classes == ("one, two\nthree",)
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nb.png,y\n")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        load_captioned(tmp_path, 4).images(torch.arange(2))
    with pytest.raises(ValueError, match="size = 0"):
        load_captioned(tmp_path, 0)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"pictures = .none in "):
        load_captioned(tmp_path / "none")


def test_three_styles_of_a_folder_agree(folder, tmp_path):
    "A table of either kind, or a text beside each picture; what is missing or unlike is named."
    for style in ("csv", "txt"):
        shutil.copytree(folder, tmp_path / style)
        (tmp_path / style / "metadata.jsonl").unlink()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    table = "".join(f"{row['file_name']},{row['text']}\n" for row in rows)
    (tmp_path / "csv" / "metadata.csv").write_text("file_name,text\n" + table)
    for row in rows:
        (tmp_path / "txt" / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    data = load_captioned(folder)
    for style in ("csv", "txt"):
        same = load_captioned(tmp_path / style)
        assert torch.equal(same.images(torch.arange(9)), data.images(torch.arange(9)))
        assert (same.classes, same.labels.tolist()) == (data.classes, data.labels.tolist())
    (tmp_path / "txt" / "5.txt").unlink()
    broken = tmp_path / "csv" / "5.png"
    with pytest.raises(ValueError, match=r"5\.png has no caption; allowed: 5\.txt"):
        load_captioned(tmp_path / "txt")
    with pytest.raises(FileNotFoundError, match="none"):
        load_captioned(tmp_path / "none")
    with pytest.raises(ValueError, match=r"0\.png has no caption; allowed: a row of metadata"):
        load_captioned(folder, column="label")
    broken.unlink()
    with pytest.raises(ValueError, match=r"5\.png is in"):
        load_captioned(tmp_path / "csv")
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"5\.png cannot be read"):
        load_captioned(tmp_path / "csv")
    with pytest.raises(ValueError, match=r"5\.png cannot be read"):
        load_captioned(tmp_path / "csv", 8).images(torch.arange(9))
    Image.new("RGB", (24, 24)).save(broken)
    with pytest.raises(ValueError, match=r"5\.png is 24x24; allowed: images of one size, or give size"):
        load_captioned(tmp_path / "csv")
    assert load_captioned(tmp_path / "csv", 8).images(torch.arange(9)).shape == (9, 3, 8, 8)


def test_captions_of_other_programs_are_read_or_named(tmp_path):
    "A byte order mark is no part of a caption; Latin-1 is said to be none of UTF-8."
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red cat", encoding="utf-8-sig")
    assert load_captioned(tmp_path).classes == ("red cat",)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a caf\u00e9\n", encoding="utf-8-sig")
    assert load_captioned(tmp_path).classes == ("a caf\u00e9",)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a caf\u00e9\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"metadata\.csv .*UTF-8") as error:
        load_captioned(tmp_path)
    assert "\n" not in str(error.value)


def test_cache_holds_what_the_encoders_say(pipeline, folder, cached):
    "Restated with the text encoder and the autoencoder alone."
    words = pipeline.tokenizer(["", *CAPTIONS], padding="max_length", max_length=10, return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipeline.text_encoder(words)[0]
        images = load_captioned(folder).images(torch.arange(9)).float() / 127.5 - 1
        moments = pipeline.vae.encode(images).latent_dist
    assert_close(cached.null, text[:1])
    cached = replace(cached, latents=replace(cached.latents, posterior=False))
    x, c = cached.fetch(torch.tensor([8, 1, 4]), keyed_generator(0))
    assert_close(x, 0.7 * moments.mean[[8, 1, 4]], rtol=1e-4, atol=1e-5)
    assert_close(c, text[[3, 2, 2]])
    assert (len(cached), cached.shape, tuple(cached.null.shape)) == (9, (4, 8, 8), (1, 10, 16))
    assert_close(cached.rows(torch.arange(4)), text)


def test_part_of_a_batch_is_that_part_of_the_whole(cached):
    "Posterior draws included."
    indices = torch.tensor([3, 0, 7, 5])
    x, _ = cached.fetch(indices, keyed_generator(1))
    assert torch.equal(x[1:3], cached.fetch(indices, keyed_generator(1), slice(1, 3))[0])


def test_caches_of_other_pipelines_and_pictures_are_refused(pipeline, folder, tmp_path):
    with pytest.raises(ValueError, match=r"latents\.json cannot be read"):
        load_cached(tmp_path / "no")
    cache_captioned(folder, tmp_path / "cache", pipeline, progress=False)
    shutil.copytree(folder, tmp_path / "others")
    table = tmp_path / "others" / "metadata.jsonl"
    table.write_text("\n".join(table.read_text().splitlines()[:6]))
    for k in (6, 7, 8):
        (tmp_path / "others" / f"{k}.png").unlink()
    with pytest.raises(ValueError, match="was made with"):
        cache_captioned(tmp_path / "others", tmp_path / "cache", pipeline, progress=False)


def test_cache_goes_on_and_tells_damage(pipeline, folder, tmp_path):
    cache_captioned(folder, tmp_path, pipeline, progress=False)
    shard = tmp_path / "text" / "text-00000.safetensors"
    before = shard.stat().st_mtime_ns
    cache_captioned(folder, tmp_path, pipeline, progress=False)
    assert shard.stat().st_mtime_ns == before
    other = copy.copy(pipeline)
    other.text_encoder = CLIPTextModel(CLIPTextConfig(**TOWER, **WORDS))
    with pytest.raises(ValueError, match="was made with encoder"):
        cache_captioned(folder, tmp_path, other, progress=False)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"text-00000\.safetensors is missing or damaged"):
        load_cached(tmp_path)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_prediction_on_the_schedulers_own_levels(prediction, pipeline, cached):
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction)
    model = TextDenoiser(copy.deepcopy(pipeline.unet), scheduler, cached.null)
    x, c, step = torch.randn(3, 4, 8, 8), cached.rows(torch.tensor([1, 2, 3])), torch.tensor([0, 500, 999])
    level = scheduler.alphas_cumprod[step][:, None, None, None]
    alpha, sigma = level.sqrt(), (1 - level).sqrt()
    with torch.no_grad():
        y = model.net(x, step, c).sample
        found = model.predict(x, (step + 1) / 1000, c)
    x0 = (x - sigma * y) / alpha if prediction == "epsilon" else alpha * x - sigma * y
    assert_close(found.x0, x0, rtol=2e-3, atol=2e-3)
    assert model.num_classes == EMBEDDINGS


class Lookup(nn.Module):
    "Posterior means of a finite joint distribution of (x0, class, noise), as a network that knows x and the label."

    def __init__(self, x, c, y):
        super().__init__()
        self.x, self.c, self.y = x, c, y

    def forward(self, x, time, labels):
        out = torch.empty_like(x)
        for i in range(len(x)):
            same = (self.x - x[i]).abs().flatten() < 1e-9
            if labels[i] < 2:
                same &= self.c == labels[i]
            out[i] = self.y[same].mean()
        return out


class Enumerate(LossContext):
    "Times and noise of an enumeration instead of random ones."

    def times(self, x):
        return torch.full((len(x),), 0.5, dtype=x.dtype)

    def noise(self, x):
        return self.listed


@pytest.mark.parametrize("w", [0.5, 3.0, 7.5])
def test_losses_at_the_optimum_are_floor_plus_guidance(w):
    "Methods A1.2 item 5 without integrals: any joint distribution will do, so take one of finitely many points."
    points = [(-1.0, 0), (1.0, 0), (1.0, 1), (3.0, 1)]
    pairs = [(x0, c, eps) for x0, c in points for eps in (-2.0, 0.0, 2.0)]
    x0, c, eps = (torch.tensor(v, dtype=torch.float64) for v in zip(*pairs))
    x0, c, eps = x0[:, None], c.long(), eps[:, None]
    net = Lookup((x0 + eps) / 2, c, eps)
    model = NetworkDenoiser(net, FlowPath(), 2, "eps")
    listed = Enumerate(torch.Generator(), 0, 1, model)
    listed.listed = eps
    e_c, e_u = net((x0 + eps) / 2, None, c), net((x0 + eps) / 2, None, torch.full_like(c, 2))
    floor, gap = (eps - e_c).square().mean(), (e_c - e_u).square().mean()
    assert gap > 0.01 and floor > 0.01
    assert_close(AlignedLoss(w)(model, x0, c, listed).mean(), floor + (w - 1) ** 2 * gap)
    assert_close(TwoStageAlignedLoss(w)(model, x0, c, listed).mean(), floor + (w - 1) ** 2 * gap)
    guided = ModelGuidanceLoss(w, dropout=0.0, target="frozen", frozen=model)
    assert_close(guided(model, x0, c, listed).mean(), floor + w**2 * gap)


@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_two_stages_are_two_backward_passes(pipeline, cached, anchor):
    "Value and gradient against the chain rule with a fixed residual, in double precision."
    model = load_text_denoiser(pipeline, cached.null).double().train()
    x0, c, w = torch.randn(3, 4, 8, 8).double(), cached.rows(torch.tensor([1, 2, 3])).double(), 4.0
    draws = context()
    t, eps = draws.times(x0), draws.noise(x0)
    x, y = model.path.interpolate(x0, eps, t), model.target(x0, eps, t)
    with torch.no_grad():
        e_c, e_u = model.output(x, t, c), model.output(x, t)
        r = y - e_u - w * (e_c - e_u)
        value = (r.square() + anchor * (y - e_u).square()).mean()
    (model.output(x, t, c) * (-2 * w * r / r.numel())).sum().backward()
    (model.output(x, t) * (2 * ((w - 1) * r - anchor * (y - e_u)) / r.numel())).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for recompute in (False, True):
        if recompute:
            model.net.enable_gradient_checkpointing()
        model.zero_grad()
        found = TwoStageAlignedLoss(w, anchor)(model, x0, c, context()).mean()
        found.backward()
        assert_close(found.detach(), value, rtol=1e-12, atol=0)
        for p, g in zip(model.parameters(), expected):
            assert_close(p.grad, g, rtol=1e-6, atol=1e-12)


def test_two_stages_have_the_gradient_of_one(pipeline, cached):
    "To rounding in double precision, as the norm of the difference."
    model, found = load_text_denoiser(pipeline, cached.null).double().train(), []
    x0, c = torch.randn(4, 4, 8, 8).double(), cached.rows(torch.tensor([1, 2, 3, 1])).double()
    for loss in (AlignedLoss(3.0), TwoStageAlignedLoss(3.0)):
        model.zero_grad()
        value = loss(model, x0, c, context(3)).mean()
        value.backward()
        found.append((value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (one, whole), (two, parts) = found
    assert (parts - whole).norm() / whole.norm() < 1e-10 and abs(two / one - 1) < 1e-12


def test_two_stages_train_the_same_network(pipeline, cached):
    "Through fit, with micro-batches, lower precision and LoRA."
    for options in ({"precision": "fp32", "gradient_accumulation_steps": 2}, {"precision": "bf16"}):
        runs = []
        for loss in (AlignedLoss(3.0), TwoStageAlignedLoss(3.0)):
            model = load_text_denoiser(pipeline, cached.null, lora_rank=2)
            engine = Engine(cpu=True, **options)
            how = {"batch_size": 6, "lr": 1e-3, "schedule": "constant", "progress": False, "engine": engine}
            state = train(model, loss, cached, 2, **how)
            runs.append(torch.cat([v.flatten() for v in state.model.state_dict().values()]))
        start = load_text_denoiser(pipeline, cached.null, lora_rank=2).state_dict()
        moved = (runs[0] - torch.cat([v.flatten() for v in start.values()])).norm()
        assert (runs[0] - runs[1]).norm() < (0.01 if options["precision"] == "fp32" else 0.2) * moved


def test_memory_of_one_branch(pipeline, cached):
    x0, c, peaks = torch.randn(16, 4, 8, 8), cached.rows(torch.arange(16) % 3 + 1), {}
    for name, loss in {"plain": DenoisingLoss(0.1), "one": AlignedLoss(3.0), "two": TwoStageAlignedLoss(3.0)}.items():
        model = load_text_denoiser(pipeline, cached.null).train()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            loss(model, x0, c, context()).mean().backward()
        made = [event.nbytes() for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
        peaks[name] = np.cumsum(made).max()
        gradients = sum(p.numel() * 4 for p in model.parameters())
        del model
    assert peaks["one"] > 1.85 * peaks["plain"]
    assert peaks["two"] < 1.03 * peaks["plain"] + gradients


def test_lora_and_a_scale_input_change_nothing_at_the_start(pipeline, cached, saved):
    x, t, c = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.4, 0.95]), cached.rows(torch.tensor([1, 2, 3]))
    plain = load_text_denoiser(pipeline, cached.null)
    lora = load_text_denoiser(pipeline, cached.null, lora_rank=4)
    aware = load_text_denoiser(pipeline, cached.null, scale_aware=True)
    with torch.no_grad():
        for model in (lora, aware):
            assert torch.equal(model.output(x, t, c), plain.output(x, t, c))
        assert torch.equal(aware.output(x, t, c, scale=5.0), plain.output(x, t, c))
    twin = copy.deepcopy(lora)
    shared = {p.data_ptr() for p in lora.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert len(shared) == len(lora.frozen)
    assert all("lora" in name or name == "null" for name in lora.state_dict())
    for options, told in (
        ({"lora_rank": 4, "scale_aware": True}, "lora_rank = 4; allowed: 0"),
        ({"lora_rank": 4, "lora_layers": ("to_x",)}, "layer = 'to_x'"),
    ):
        with pytest.raises(ValueError, match=told):
            load_text_denoiser(pipeline, cached.null, **options)
    with pytest.raises(ValueError, match="cannot be opened"):
        load_text_denoiser(str(saved.parent), cached.null)


def test_merged_lora_is_what_was_trained(pipeline, cached, folder, tmp_path):
    model = load_text_denoiser(pipeline, cached.null, lora_rank=4)
    how = {"batch_size": 6, "lr": 1e-2, "ema": 0.5, "progress": False}
    tuned = train(model, TwoStageAlignedLoss(2.0), cached, 3, engine=Engine(cpu=True, precision="fp32"), **how).ema
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert (merged_network(tuned).state_dict()[key] - pipeline.unet.state_dict()[key]).abs().max() > 1e-3
    save_pipeline(tuned, pipeline, tmp_path / "merged")
    save_pipeline(load_text_denoiser(pipeline, cached.null), pipeline, tmp_path / "base")
    save_lora(tuned, tmp_path / "lora")
    noise, images = torch.randn(2, 4, 8, 8), []
    for part in ("merged", "base"):
        there = StableDiffusionPipeline.from_pretrained(str(tmp_path / part))
        there.set_progress_bar_config(disable=True)
        if part == "base":
            there.load_lora_weights(tmp_path / "lora")
        call = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "pt"}
        images.append(there(["red cat", "blue dog"], **call).images)
    assert_close(images[1], images[0], rtol=0, atol=1e-4)
    with pytest.raises(AttributeError, match="peft_config"):
        save_lora(load_text_denoiser(pipeline, cached.null), tmp_path / "x")
    with pytest.raises(ValueError, match="allowed: a new one, or one that holds a pipeline"):
        save_pipeline(tuned, pipeline, folder)


def test_lora_is_shared_and_small(pipeline, cached, saved):
    model = load_text_denoiser(str(saved), cached.null, lora_rank=2, lora_layers=("to_v",))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(".to_v.lora_" in name for name in names)
    twin = copy.deepcopy(model)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters()):
        assert (a is b) == (name not in names)
    twin.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert_close(twin.state_dict()[names[0]], model.state_dict()[names[0]] + 1)
    assert twin.frozen == model.frozen


def our_images(model, pipeline, noise, prompts, steps):
    with torch.no_grad():
        ids = pipeline.tokenizer(prompts, padding="max_length", max_length=10, return_tensors="pt").input_ids
        c = pipeline.text_encoder(ids)[0]
        times = scheduler_times(pipeline.scheduler, steps)
        x = sample(model, c, tuple(noise.shape[1:]), "ddim", times=times, init=noise, progress=False)
        return (pipeline.vae.decode(x / 0.7).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("method", ["plain", "aligned", "mg", "aware"])
def test_tuned_pipeline_opens_in_plain_diffusers(method, pipeline, folder, cached, tmp_path):
    loss = {
        "plain": DenoisingLoss(0.3), "aligned": TwoStageAlignedLoss(2.0), "mg": ModelGuidanceLoss(0.5),
        "aware": ModelGuidanceLoss(scale_range=(1.0, 4.0)),
    }[method]  # fmt: skip
    model = load_text_denoiser(pipeline, cached.null, scale_aware=method == "aware")
    how = {"batch_size": 6, "lr": 1e-2, "ema": 0.5, "progress": False}
    tuned = train(model, loss, cached, 3, engine=Engine(cpu=True, precision="fp32"), **how).ema
    save_pipeline(tuned, pipeline, tmp_path / "out")
    there = StableDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    there.set_progress_bar_config(disable=True)
    scale = {"plain": 3.0, "aligned": 2.0, "mg": 1.0, "aware": 3.5}[method]
    noise, prompts = torch.randn(2, 4, 8, 8), ["red cat", "blue dog"]
    theirs = there(prompts, num_inference_steps=4, guidance_scale=scale, latents=noise, output_type="pt").images
    guided = (FixedScale if method == "aware" else ClassifierFreeGuidance)(tuned, scale)
    with count_nfe() as rows:
        assert_close(our_images(guided, there, noise, prompts, 4), theirs, rtol=0, atol=1e-4)
    assert rows.total == 2 * 4 * (1 if method in ("mg", "aware") else 2)
    old = ClassifierFreeGuidance(load_text_denoiser(pipeline, cached.null), scale)
    before = our_images(old, there, noise, prompts, 4)
    assert (before - theirs).abs().max() > 1e-3


def test_clip_score_is_the_clipped_cosine(pipeline, cached, tmp_path):
    torch.manual_seed(2)
    eye = {**TOWER, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**TOWER, **WORDS}, vision_config=eye, projection_dim=3)).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.5)  # fresh weights are so small that all texts look alike
    looks = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(looks, tokenizer())
    images, prompts = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8), ["cat", "dog", "a red ox"] * 4
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (looks.image_mean, looks.image_std))
        seen = model.visual_projection(model.vision_model((images / 255 - mean) / std).pooler_output)
        ids = tokenizer()(prompts, padding=True, return_tensors="pt")
        told = model.text_projection(model.text_model(**ids).pooler_output)
    cosine = (seen * told).sum(1) / seen.norm(dim=1) / told.norm(dim=1)
    assert (cosine < 0).any() and (cosine > 0).any()
    scores = clip_score(images, prompts, (model, processor), batch_size=5)
    assert_close(scores, 100 * cosine.clamp(min=0), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="2 for 12 images"):
        clip_score(images, prompts[:2], (model, processor))
    model.visual_projection.weight.data.neg_()  # every cosine changes its sign
    assert torch.equal(clip_score(images, prompts, (model, processor)) > 0, cosine < 0)
    model.visual_projection.weight.data.neg_()
    model.save_pretrained(str(tmp_path))
    processor.save_pretrained(str(tmp_path))
    assert_close(clip_score(images, prompts, str(tmp_path)), scores)
    with pytest.raises(ValueError, match="cannot be opened"):
        clip_score(images, prompts, str(tmp_path / "none"))
    models = {"before": load_text_denoiser(pipeline, cached.null)}
    grid, table = compare_scales(
        models, ("red cat",), pipeline, (1, 3), clip=(model, processor), steps=2, progress=False
    )
    assert grid.shape == (1, 2, 1, 3, 16, 16)
    assert [(row["scale"], row["nfe"]) for row in table] == [(1.0, 2.0), (3.0, 4.0)]
    assert_close(table[1]["clip_score"], clip_score(grid[0, 1], ["red cat"], (model, processor)).item())


def recipe(pipeline, folder, **changes):
    return override(FineTuning(), {"pipeline": str(pipeline), "data": str(folder), **changes})


def call(*words):
    return CliRunner().invoke(app, ["finetune", *map(str, words)], catch_exceptions=False)


TINY = ("--size", 0, "--steps", 2, "--batch-size", 4, "--gradient-accumulation-steps", 2, "--precision", "fp32")
TINY += ("--cpu", "--no-progress")


@pytest.mark.parametrize("name", recipe_names(FineTuning))
def test_every_recipe_runs_from_the_command_line(name, folder, saved, tmp_path):
    extra = ("--prompts", "red cat,blue dog", "--grid-scales", "1,2", "--grid-steps", 2)
    run = call(name, "--pipeline", saved, "--data", folder, "--out", tmp_path / "run", *TINY, *extra)
    assert run.exit_code == 0 and "2 steps done" in run.stdout
    there = StableDiffusionPipeline.from_pretrained(str(tmp_path / "run" / "pipeline"))
    there.set_progress_bar_config(disable=True)
    assert there("red cat", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    with open(tmp_path / "run" / "grid.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points = [(row["model"], float(row["scale"])) for row in rows]
    assert points == [("before", 1), ("before", 2), ("after", 1), ("after", 2)]
    assert Image.open(tmp_path / "run" / "grid.png").size[0] > 2 * 16
    assert (tmp_path / "run" / "lora").exists() == ("lora" in name)
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert f"guidance_scale={ {'sd15-plain': '7.5', 'sd15-mg': '1', 'sd15-mg-aware': '3'}.get(name, '2') })" in card


def test_command_line_goes_on_and_refuses(folder, saved, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        f'pipeline = "{saved}"\ndata = "{folder}"\n[method]\nname = "aligned_loss"\nscale = 2.0\n'
        "[training]\nsave_every = 1\n"
    )
    assert call(file, "--out", tmp_path / "run", *TINY).exit_code == 0
    run = call(file, "--out", tmp_path / "run", *TINY[:2], "--steps", 4, *TINY[4:])
    assert run.exit_code == 0 and "4 steps done" in run.stdout
    straight = call(file, "--out", tmp_path / "straight", *TINY[:2], "--steps", 4, *TINY[4:])
    assert straight.exit_code == 0
    nets = [UNet2DConditionModel.from_pretrained(str(tmp_path / n / "pipeline" / "unet")) for n in ("run", "straight")]
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(a, b)
    for words, told in {
        ("--lr", "1"): "lr = ",
        ("--rank", "1"): "unknown key 'rank'; did you mean pipeline.lora_rank?",
        ("--method", "dpo"): "method.name = 'dpo'",
        ("--scale-range", "a"): "scale_range = 'a'; allowed: a list of numbers",
        ("--pipeline", ""): "pipeline = ''",
    }.items():
        with pytest.raises(ValueError, match=told):
            call(file, "--out", tmp_path / "run", *TINY, *words)


def test_bad_pipelines_are_refused_in_one_line(pipeline, folder, saved, tmp_path):
    cases = {
        "network = 'StableDiffusion3Pipeline'; allowed: UNet2DModel": diffusers_cases.stable_diffusion_3(),
        "not on sizes, as SDXL's is, or pictures, as those for inpainting are": make_pipeline(channels=9),
        "prediction_type of DDIMScheduler = 'flow'": make_pipeline(
            DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="flow")
        ),
        "conditioned on text alone": make_pipeline(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40
        ),
    }
    for told, bad in cases.items():
        with pytest.raises(ValueError, match=told) as error:
            cache_captioned(folder, tmp_path / "no", bad)
        assert "\n" not in str(error.value) and not (tmp_path / "no").exists()
    usual = make_pipeline(PNDMScheduler(**SCHEDULE, skip_prk_steps=True))  # as Stable Diffusion 1.5 has it
    assert len(cache_captioned(folder, tmp_path / "yes", usual, progress=False)) == 9
    with pytest.raises(ValueError, match="cannot be opened"):
        list(finetune(recipe(saved / "unet", folder), saved / "x", progress=False))


def test_too_little_memory_names_the_knobs(folder, saved, tmp_path, monkeypatch):
    def starve(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(AlignedLoss, "__call__", starve)
    small = recipe(saved, folder, method="aligned_loss", scale=2.0, batch_size=4, steps=1)
    with pytest.raises(torch.OutOfMemoryError) as error:
        list(finetune(small, tmp_path, progress=False, cpu=True))
    told = str(error.value)
    for knob in (
        "batch_size",
        "gradient_accumulation_steps = 2",
        "gradient_checkpointing = true",
        "two_stage = true",
        "lora_rank = 16",
        "a smaller size",
    ):
        assert knob in told
    assert "\n" not in told
    costly = override(small, {"two_stage": False, "lora_rank": 0, "gradient_checkpointing": False})
    keys = "two_stage = true, lora_rank = 16, gradient_checkpointing = true, a smaller size"
    with pytest.raises(torch.OutOfMemoryError, match=keys), add_memory_hint(costly):
        raise torch.OutOfMemoryError("out of memory at step 0; allowed: accumulate = 4")
    with pytest.raises(RuntimeError, match=r"^other$"), add_memory_hint(small):
        raise RuntimeError("other")


def test_recipes_are_read_strictly(tmp_path):
    changed = read_recipe("sd15-mg", {"lora-rank": "4", "gradient-checkpointing": "false"}, FineTuning)
    assert changed.pipeline.lora_rank == 4 and not changed.training.gradient_checkpointing
    for text, told in {
        "training.steps = 1.5": "steps = 1.5; allowed: a whole number",
        "data.flip = 1.5": "flip = 1.5; allowed: true or false",
        "grid.prompts = 3": "prompts = 3; allowed: a list",
        "steps =": "cannot be read",
        "method.interval = [0.5]": "allowed: a list of 2 numbers",
    }.items():
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ValueError, match=told):
            read_recipe(tmp_path / "bad.toml", kind=FineTuning)
    for name, flags, told in (
        ("sd15-none", {}, "or a name such as sd15-"),
        ("sd15-mg", {"lora_rnk": 1}, r"unknown key 'lora_rnk'; did you mean pipeline\.lora_rank\?"),
        ("sd15-mg", {"steps": "many"}, "steps = 'many'; allowed: a whole number"),
        ("sd15-mg", {"method": "dpo"}, r"method\.name = 'dpo'; allowed: 'plain'"),
    ):
        with pytest.raises(ValueError, match=told):
            read_recipe(name, flags, FineTuning)
    with pytest.raises(ValueError, match="data = ''; allowed: a folder of captioned pictures"):
        next(finetune(FineTuning(), tmp_path / "x"))
    assert recipe_names(FineTuning) == ["sd15-aligned", "sd15-aligned-lora", "sd15-mg", "sd15-mg-aware", "sd15-plain"]
    aware = recipe("x", "y", method="model_guidance", scale_range=[1, 3], lora_rank=4)
    with pytest.raises(ValueError, match="lora_rank = 4; allowed: 0, for a scale-aware network"):
        next(finetune(aware, tmp_path / "run"))  # before anything is encoded
    aware = recipe("x", "y", method="model_guidance", scale_range=[1])
    with pytest.raises(ValueError, match=r"scale_range = \(1.0,\); allowed: "):
        next(finetune(aware, tmp_path / "run"))
    baked = recipe("x", "y", method="model_guidance", scale=0)
    with pytest.raises(ValueError, match=r"scale = 0.0; allowed: above 0"):
        next(finetune(baked, tmp_path / "run"))
