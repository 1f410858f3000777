"Models people already have: against diffusers' own schedulers, loops, pipelines and guiders, and against torchcfm."

import copy
import json
import math
import re
from types import SimpleNamespace

import diffusers
import diffusers_cases as cases
import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance as TheirGuidance
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from guidance_nb._conditions import take_rows
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import EMBEDDINGS, Denoiser, NetworkDenoiser, OnPath, Prediction, count_nfe, to_prediction
from guidance_nb.engine._run import Engine
from guidance_nb.guidance_variants import AdaptiveProjectedGuidance
from guidance_nb.images._networks import image_denoiser
from guidance_nb.interop._diffusers import DiffusersDenoiser, from_diffusers
from guidance_nb.interop._functions import from_callable, from_torchcfm
from guidance_nb.interop._guider import DiffusersGuider, PipelineDenoiser
from guidance_nb.interop._hub import HubDenoiser, TrainingFacts, path_from_json, path_to_json
from guidance_nb.interop._networks import to_patches
from guidance_nb.interop._schedulers import SchedulerFacts, TablePath, _Clock, path_from_scheduler, scheduler_times
from guidance_nb.model_guidance import ModelGuidanceLoss
from guidance_nb.paths import EDMPath, FlowPath, VPPath, change_path
from guidance_nb.samplers import sample
from guidance_nb.training import DenoisingLoss, LossContext, fit, train

DISCRETE = [
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "DEISMultistepScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
]  # fmt: skip
V = {"prediction_type": "v_prediction"}
PROMPTS = ["a cat", "two dogs"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of diffusers' schedulers


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("beta", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", DISCRETE)
def test_the_table_of_every_discrete_scheduler(name, beta):
    scheduler = getattr(diffusers, name)(beta_schedule=beta)
    facts, i = path_from_scheduler(scheduler), torch.arange(1000)
    t = (i + 1).double() / 1000
    assert_close(facts.path.alpha(t).square(), scheduler.alphas_cumprod.double(), rtol=0, atol=1e-12)
    assert_close(facts.path.sigma(t).square(), 1 - scheduler.alphas_cumprod.double(), rtol=0, atol=1e-12)
    assert_close(facts.clock(t), i.float(), rtol=0, atol=1e-4)
    assert_close(facts.clock(t.float()), i.float(), rtol=0, atol=1e-3)
    assert facts.prediction == "eps"


@pytest.mark.parametrize("kind, name", [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
@pytest.mark.parametrize("rescaled", [False, True])
def test_what_was_predicted_is_decoded_as_the_scheduler_does(kind, name, rescaled):
    "The scheduler's `pred_original_sample`, restated by hand from alphas_cumprod, and from its own step."
    scheduler = cases.ddim(prediction_type=kind, rescale_betas_zero_snr=rescaled)
    scheduler.set_timesteps(50)
    if rescaled and kind == "epsilon":  # without signal the noise is the data point itself, and says nothing of x0
        refuse(lambda: path_from_scheduler(scheduler), "with zero terminal SNR = 'epsilon'; allowed: 'v_prediction'")
        return
    facts, (x, y) = path_from_scheduler(scheduler), torch.randn(2, 3, 4, 8, 8)
    assert facts.prediction == name
    for i in (961, 501, 21):
        theirs = scheduler.step(y, i, x).pred_original_sample
        ours = to_prediction(y, x, facts.clock.time(torch.tensor(i)), facts.path, facts.prediction)
        assert_close(ours.x0, theirs, rtol=1e-4, atol=1e-4)
    if rescaled:
        assert scheduler.alphas_cumprod[-1] == 0 and facts.path.alpha(torch.tensor(1.0)) < 1e-7
        assert facts.path.sigma(torch.tensor(1.0)) == 1


@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=12), st.floats(0.01, 1.0))
def test_any_rising_table_makes_a_path(rises, share):
    "Through all nodes, rising between them, with derivatives that finite differences confirm, and an exact inverse."
    angles = np.cumsum(rises) / np.sum(rises) * share * math.pi / 2
    path, t = TablePath(tuple(angles.tolist())), torch.linspace(0, 1, 97, dtype=torch.float64)
    nodes = torch.arange(1, len(angles) + 1).double() / len(angles)
    assert_close(path.sigma(nodes), torch.from_numpy(np.sin(angles)), rtol=0, atol=1e-12)
    assert path.alpha(torch.zeros(1)) == 1 and path.sigma(torch.zeros(1)) == 0
    assert (path.sigma(t).diff() > 0).all() and (path.alpha(t) ** 2 + path.sigma(t) ** 2 - 1).abs().max() < 1e-12
    inner, h = 0.01 + 0.98 * t, 1e-6
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        steepest = slope(inner).abs().max().item() + 1
        assert_close((value(inner + h) - value(inner - h)) / (2 * h), slope(inner), rtol=0, atol=1e-2 * steepest)
    inside = t[1:-1]
    assert_close(path.time_at(path.noise_to_signal(inside)), inside, rtol=0, atol=1e-7)


def test_a_table_path_is_a_path_like_any_other():
    path = path_from_scheduler(cases.ddim()).path
    assert path == copy.deepcopy(path) and {path: 1}[path_from_scheduler(cases.ddim()).path] == 1
    x, eps, t = torch.randn(9, 3).double(), torch.randn(9, 3).double(), torch.linspace(0.01, 1, 9, dtype=torch.float64)
    for other in (FlowPath(), VPPath("cosine"), EDMPath()):
        moved, s = change_path(path.interpolate(x, eps, t), t, path, other)
        assert_close(moved, other.interpolate(x, eps, s))
        assert_close(change_path(moved, s, other, path)[1], t)
    with pytest.raises(
        ValueError, match=r"noise-to-signal ratio of 99\.\d+; allowed: up to 14\.6"
    ):  # the table ends before that much noise
        change_path(x, torch.tensor(0.99), FlowPath(), path)
    for t in (torch.tensor(1.0), torch.ones(4), torch.ones(4, dtype=torch.float64)):
        assert (path.time_at(path.noise_to_signal(t)) == 1).all() and path.sigma(t).dtype == t.dtype


@pytest.mark.parametrize("settings", [
    {}, cases.STABLE_DIFFUSION, {"beta_schedule": "squaredcos_cap_v2"},
    {**cases.STABLE_DIFFUSION, "rescale_betas_zero_snr": True, **V},
])  # fmt: skip
def test_our_paths_hold_the_points_of_their_schedulers(settings):
    scheduler, steps = diffusers.DDIMScheduler(**settings), torch.arange(1000)
    facts, x0, eps = path_from_scheduler(scheduler), torch.randn(1000, 3), torch.randn(1000, 3)
    t = facts.clock.time(steps)
    assert_close(facts.path.alpha(t).square().float(), scheduler.alphas_cumprod, rtol=0, atol=1e-7)
    assert_close(facts.path.interpolate(x0, eps, t), scheduler.add_noise(x0, eps, steps), rtol=0, atol=2e-6)
    assert_close(facts.clock(t), steps.float())
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    facts = path_from_scheduler(flow)
    ours = facts.path.interpolate(x0, eps, facts.clock.time(flow.timesteps))
    assert_close(ours, flow.scale_noise(x0, flow.timesteps, eps), rtol=0, atol=2e-6)
    refuse(lambda: TablePath((0.2, 0.1)), "rising, from above 0")


def test_time_is_told_exactly_and_in_single_precision():
    "Half precision cannot hold a timestep: 999 would become 1000."
    seen = []
    model = from_diffusers(cases.unet().to(torch.bfloat16), cases.ddim(), null=torch.zeros(1, 5, 8))
    model.net.register_forward_pre_hook(
        lambda net, args, kwargs: seen.append((kwargs["timestep"], args[0].dtype)), with_kwargs=True
    )
    y = model.output(torch.randn(2, 4, 8, 8), torch.tensor(1.0), torch.randn(2, 5, 8))
    assert seen[0][0].tolist() == [999, 999] and seen[0][0].dtype == torch.float32
    assert seen[0][1] == torch.bfloat16 and y.dtype == torch.float32
    assert _Clock(1000, 1)(torch.tensor(0.5004)).item() == pytest.approx(499.4, abs=1e-3)


@pytest.mark.parametrize("bad, words", [
    (SimpleNamespace(config={}), "scheduler = 'SimpleNamespace'; allowed: one with alphas_cumprod"),
    (diffusers.ScoreSdeVeScheduler(), "scheduler = 'ScoreSdeVeScheduler'"),
    (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "scheduler = 'FlowMatchEulerDiscreteScheduler'"),
    (diffusers.EDMEulerScheduler(prediction_type="sample"), "prediction_type of EDMEulerScheduler = 'sample'"),
    (object(), "scheduler = 'object'; allowed: one with alphas_cumprod"),
    (diffusers.UnCLIPScheduler(prediction_type="score"), "prediction_type of UnCLIPScheduler = 'score'; allowed: 'eps"),
])  # fmt: skip
def test_schedulers_that_are_refused(bad, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        path_from_scheduler(bad)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def loop(scheduler, net, x, steps, text, **options):
    "A scheduler's own loop."
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(seen, timestep=t.expand(len(x)), encoder_hidden_states=text).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("name, options, sampler", [
    ("DDIMScheduler", {"clip_sample": False}, "ddim"),
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"} | V, "ddim"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "ddim"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "ddim"),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "lower_order_final": True}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "dpmpp_2m"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}, "euler"),
    ("FlowMatchHeunDiscreteScheduler", {}, "heun"),
    ("EDMEulerScheduler", {}, "euler"),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0}, "euler"),
])  # fmt: skip
def test_our_samplers_and_their_loops(name, options, sampler):
    text, start, net = torch.randn(2, 5, 8), torch.randn(2, 4, 8, 8), cases.unet()
    discrete = {} if name.startswith(("Flow", "EDM")) else cases.STABLE_DIFFUSION
    scheduler = getattr(diffusers, name)(**discrete, **options)
    model, times = from_diffusers(net, scheduler), scheduler_times(scheduler, 10)
    if name.startswith(("Euler", "EDM")):  # their data are ours over alpha
        level = model.path.noise_to_signal(times[0]).item()
        theirs = loop(scheduler, net, start * (1 + level**2) ** 0.5, 10, text)
        start = start * (1 + level**2) ** 0.5 * model.path.alpha(times[0]).item()
    else:
        theirs = loop(scheduler, net, start, 10, text)
    ours = sample(model, text, tuple(start.shape[1:]), sampler, times=times, init=start, progress=False)
    # Karras noise levels lie between the table's, where the interpolants differ; with flow noise levels the solver cuts
    # its timesteps to whole numbers, 99.9 to 99. In both cases the network is told slightly other times than by us.
    loose = options.get("use_karras_sigmas") or options.get("use_flow_sigmas")
    assert (ours - theirs).abs().max() < (2e-3 if loose else 2e-5) * theirs.abs().max()


def compare(pipeline, call, ours, model, inputs=(PROMPTS,)):
    "Latents, and images that are not all black or white, as the pipeline draws them."
    latents = pipeline(*inputs, output_type="latent", **call).images
    images = pipeline(*inputs, output_type="pt", **call).images
    assert_close(ours if latents.ndim == 4 else to_patches(ours)[0], latents, rtol=0, atol=2e-6 * latents.abs().max())
    shades = (model.decode_latents(ours) / 2 + 0.5).clamp(0, 1)
    assert ((shades > 0) & (shades < 1)).float().mean() > 0.1
    assert_close(shades, images, rtol=0, atol=1e-5)


def test_stable_diffusion_pipeline():
    pipeline = cases.stable_diffusion()
    start = torch.randn(2, *from_diffusers(pipeline).shape)
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": start}
    for null in ("", "a fog"):
        call["negative_prompt"] = [null] * 2
        model = from_diffusers(pipeline, null=null)
        guided, times = ClassifierFreeGuidance(model, 3.0), scheduler_times(pipeline.scheduler, 5)
        ours = sample(guided, model.encode(PROMPTS), model.shape, "ddim", times=times, init=start, progress=False)
        compare(pipeline, call, ours, model)


@pytest.mark.parametrize("make, sampler, told, names", [
    (cases.sdxl, "ddim", {}, {"encoder_hidden_states", "text_embeds", "time_ids"}),
    (cases.stable_diffusion_3, "euler", {"max_sequence_length": 8}, {"encoder_hidden_states", "pooled_projections"}),
])  # fmt: skip
def test_pipelines_with_several_conditions(make, sampler, told, names):
    pipeline = make()
    model = from_diffusers(pipeline, size=(16, 24), **told)
    start, c = torch.randn(2, *model.shape), model.encode(PROMPTS)
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": start, "height": 16, "width": 24, **told}
    times = scheduler_times(pipeline.scheduler, 4)
    guided = ClassifierFreeGuidance(model, 3.0)
    ours = sample(guided, c, model.shape, sampler, times=times, init=start, progress=False)
    assert c.keys() == model.null.keys() == names and {len(part) for part in c.values()} == {2}
    compare(pipeline, call, ours, model)


def test_the_shape_of_a_network_that_is_not_square():
    "SDXL is told heights before widths; what the autoencoder cannot divide is an error."
    pipeline, net = cases.sdxl(), cases.class_unet()
    net.register_to_config(sample_size=[8, 12])
    assert from_diffusers(net, cases.ddim()).shape == (4, 8, 12)
    wide = from_diffusers(pipeline, size=(16, 24))
    assert wide.shape == (4, 8, 12) and wide.encode(["a"])["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]
    assert from_diffusers(pipeline, size=16).shape == (4, 8, 8)
    for size in (15, (16, 25), (16, 16, 16), 0):
        with pytest.raises(ValueError, match=r"^size = [^\n]+; allowed: [^\n]+$"):
            from_diffusers(pipeline, size=size)


@pytest.mark.parametrize("embedded", [False, True])
def test_flux_pipeline(embedded):
    pipeline = cases.flux_pipeline(guidance_embeds=embedded)
    options = {"max_sequence_length": 8, "size": 16}
    model = from_diffusers(pipeline, guidance=2.5, **options)
    start, c = torch.randn(2, *model.shape), model.encode(PROMPTS)
    call = {"num_inference_steps": 4, "guidance_scale": 2.5, "latents": to_patches(start)[0], "max_sequence_length": 8}
    call |= {"height": 16, "width": 16}
    times = scheduler_times(pipeline.scheduler, 4, sigmas=np.linspace(1, 1 / 4, 4))
    ours = sample(model, c, model.shape, "euler", times=times, init=start, progress=False)
    compare(pipeline, call, ours, model)
    if embedded:  # without a fixed scale it is an input, 1 unless asked, and 0 without condition
        aware = from_diffusers(pipeline, **options)
        y = [aware.output(start, 0.5, c, scale=scale) for scale in (None, 1.0, 2.5)]
        assert aware.scale_aware and torch.equal(y[0], y[1]) and not torch.allclose(y[1], y[2])
        assert_close(y[2], model.output(start, 0.5, c))
        drop = torch.tensor([True, False])
        assert_close(aware.output(start, 0.5, c, drop, 2.5)[0], aware.output(start, 0.5)[0])
        assert_close(aware.output(start, 0.5, c, drop, 2.5)[1], y[2][1])


def test_dit_pipeline_with_a_learned_variance():
    pipeline = cases.dit_pipeline()
    model = from_diffusers(pipeline)
    assert model.encode(["tabby", 1]).tolist() == [0, 1] and model.num_classes == 1000
    assert model.null.tolist() == [1000]
    start = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0)}
    theirs = torch.from_numpy(pipeline([0, 1], output_type="np", **call).images).permute(0, 3, 1, 2)
    times, guided = scheduler_times(pipeline.scheduler, 4), ClassifierFreeGuidance(model, 3.0)
    ours = sample(guided, model.encode(["cat", 1]), model.shape, "ddim", times=times, init=start, progress=False)
    shades = (model.decode_latents(ours) / 2 + 0.5).clamp(0, 1)
    assert ((shades > 0) & (shades < 1)).float().mean() > 0.1
    assert_close(shades, theirs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="class = 'cow'; allowed: an index, or one of 3 names"):
        model.encode(["cow"])


def test_dit_does_not_drop_labels_by_itself():
    model = from_diffusers(cases.dit(3), cases.ddim()).train()
    x, c = torch.randn(64, 4, 8, 8), torch.arange(64) % 3
    assert torch.equal(model.output(x, 0.5, c), model.output(x, 0.5, c))
    assert_close(model.output(x, 0.5, c), model.eval().output(x, 0.5, c))


def test_a_pipeline_without_conditions():
    pipeline = diffusers.DDIMPipeline(cases.class_unet(), cases.ddim())
    model = from_diffusers(pipeline)
    x = sample(model, 2, model.shape, "ddim", 4, progress=False)
    assert model.num_classes == 0 and torch.equal(model.decode_latents(x), x)


def refuse(call, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_input_is_refused_in_one_line():
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    bare = from_diffusers(cases.unet(), cases.ddim())
    refuse(lambda: bare.predict(x, 0.5), "null is None; allowed: a null condition")
    refuse(lambda: bare.output(x, 0.5, text, torch.tensor([True, False])), "null is None")
    assert torch.equal(bare.output(x, 0.5, text, torch.tensor([False, False])), bare.output(x, 0.5, text))
    model = from_diffusers(cases.unet(), cases.ddim(), null=torch.zeros(1, 7, 8))
    refuse(lambda: model.output(x, 0.5, text, torch.tensor([True, False])), "c has shape (2, 5, 8); allowed")
    refuse(lambda: from_diffusers(cases.unet(), cases.ddim(), null=torch.zeros(2, 5, 8)), "null = (2, 5, 8); allowed")
    refuse(lambda: from_diffusers(cases.unet(), cases.ddim(), null=3), "null = 3; allowed: the condition [1, ...]")
    classes = cases.class_unet(num_class_embeds=4)
    refuse(lambda: from_diffusers(classes, cases.ddim(), null=7), "null = 7; allowed: None, or the last of")
    assert from_diffusers(classes, cases.ddim()).num_classes == 4
    refuse(lambda: from_diffusers(classes, cases.ddim()).predict(x, 0.5), "null is None")
    several = from_diffusers(cases.sd3(), cases.ddim())
    told = "allowed: a tensor each for encoder_hidden_states, pooled_projections"
    refuse(lambda: several.predict(x, 0.5, text), f"c = 'a tensor'; {told}")
    other = {"encoder_hidden_states": text, "text_embeds": torch.randn(2, 6)}
    refuse(lambda: several.predict(x, 0.5, other), f"c = 'encoder_hidden_states, text_embeds'; {told}")
    mask = {"encoder_hidden_states": text, "encoder_attention_mask": torch.ones(2, 7)}  # would be dropped
    refuse(lambda: bare.predict(x, 0.5, mask), "c = 'encoder_attention_mask, encoder_hidden_states'; allowed: a tensor")
    refuse(lambda: from_diffusers(nn.Linear(2, 2), cases.ddim()), "network = 'Linear'; allowed: UNet2DModel")
    refuse(lambda: from_diffusers(SimpleNamespace()), "scheduler = 'NoneType'; allowed: one with alphas_cumprod")
    whole = SimpleNamespace(scheduler=cases.ddim())
    refuse(lambda: from_diffusers(whole), "network = 'SimpleNamespace'; allowed: UNet2DModel")
    refuse(lambda: from_diffusers(cases.unet()), "scheduler = 'NoneType'; allowed: one with alphas_cumprod")
    mute = cases.stable_diffusion()
    mute.text_encoder = None
    mute = from_diffusers(mute)
    refuse(lambda: mute.encode(PROMPTS), "text encoder = 'None in StableDiffusionPipeline'; allowed: conditions made")
    refuse(lambda: mute.predict(x, 0.5), "null is None")


@pytest.mark.parametrize("loss", [DenoisingLoss(0.3), AlignedLoss(2.0), ModelGuidanceLoss(0.45, dropout=0.3)])
@pytest.mark.parametrize("kind", ["text", "several", "classes", "dit"])
def test_every_loss_trains_every_kind(loss, kind):
    "Embeddings as conditions through one loop: the loss falls, the null condition stays, EMA is of the same class."
    text, latents = torch.randn(4, 5, 8), torch.randn(4, 4, 8, 8)
    several = {"encoder_hidden_states": text, "pooled_projections": torch.randn(4, 6)}
    none = {name: part[3:] * 0 for name, part in several.items()}
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    model, c = {
        "text": lambda: (from_diffusers(cases.unet(), cases.ddim(), text[3:] * 0), text),
        "several": lambda: (from_diffusers(cases.sd3(8, 6), flow, none), several),
        "classes": lambda: (from_diffusers(cases.class_unet(num_class_embeds=5), flow, 4), torch.arange(4)),
        "dit": lambda: (from_diffusers(cases.dit(4), cases.ddim()), torch.arange(4)),
    }[kind]()
    before = copy.deepcopy(model)
    data = latents.repeat(8, 1, 1, 1), take_rows(c, torch.arange(32) % 4)
    state = train(model, loss, data, 12, 16, lr=3e-3, ema=0.8, progress=False)
    plain, (x, labels) = DenoisingLoss(0.0), data
    value = [
        plain(each.eval(), x, labels, LossContext(torch.Generator().manual_seed(0), 0, 1, None)).mean().item()
        for each in (before, model)
    ]
    assert math.isfinite(state.loss) and type(state.ema) is DiffusersDenoiser
    assert value[1] < value[0]
    assert_close(model.null, before.null, rtol=0, atol=0)


def test_model_guidance_with_text_has_no_other_classes():
    model = from_diffusers(cases.unet(), cases.ddim(), torch.zeros(1, 5, 8))
    data = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 8)
    for unconditional in ("contrastive", "uniform"):
        loss = ModelGuidanceLoss(0.3, unconditional=unconditional)
        refuse(lambda: train(model, loss, data, 1, 4, progress=False), f"unconditional = '{unconditional}'; allowed")  # noqa: B023


def test_fine_tune_resume_save_load_with_plain_diffusers(tmp_path):
    "encode -> train -> resume -> save: plain diffusers draws the same images from the folder."
    pipeline = cases.stable_diffusion()
    model = from_diffusers(pipeline)
    shape = model.shape
    data = torch.randn(4, *shape), model.encode(["a cat", "two dogs", "red", "blue"])
    whole, half = copy.deepcopy(model), copy.deepcopy(model)
    options = {"batch_size": 4, "ema": 0.5, "progress": False, "lr": 1e-3}
    train(whole, DenoisingLoss(0.2), data, 6, **options)
    kept = Engine(folder=str(tmp_path / "run"), save_every=3, precision="fp32", cpu=True)
    first = fit(half, DenoisingLoss(0.2), data, 6, engine=kept, **options)
    for _ in range(3):
        next(first)
    first.close()
    train(model, DenoisingLoss(0.2), data, 6, engine=kept, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters()))
    pipeline.save_pretrained(tmp_path / "pipeline")  # the pipeline holds the very network that was trained
    again = cases.quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None))
    start = torch.randn(2, *shape)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "latents": start}
    times, guided = scheduler_times(again.scheduler, 4), ClassifierFreeGuidance(model.eval(), 2.0)
    ours = sample(guided, model.encode(PROMPTS), shape, "ddim", times=times, init=start, progress=False)
    compare(again, call, ours, model)


def test_rows_are_counted_and_a_pair_is_one_pass():
    model = from_diffusers(cases.unet(), cases.ddim(), torch.zeros(1, 5, 8))
    calls, x, text = [], torch.randn(3, 4, 8, 8), torch.randn(3, 5, 8)
    model.net.register_forward_pre_hook(lambda net, args: calls.append(len(args[0])))
    for batching, expected in (("batched", [6]), ("sequential", [3, 3])):
        calls.clear()
        with count_nfe() as rows:
            pair = model.predict_pair(x, torch.tensor(0.3), text, batching)
        assert (rows.total, calls) == (6, expected)
        assert_close(pair[1].eps, model.eps(x, torch.tensor(0.3)))
    moved = OnPath(model, FlowPath()).predict(x, torch.tensor(0.3), text)
    assert_close(FlowPath().interpolate(*moved, torch.tensor(0.3)), x, rtol=1e-4, atol=1e-4)


def test_torchcfm_interpolates_and_regresses_as_we_do():
    matching = pytest.importorskip("torchcfm.conditional_flow_matching")
    data, noise, t = torch.randn(8, 3), torch.randn(8, 3), torch.rand(8)
    for matcher, path in (
        (matching.ConditionalFlowMatcher(0.0), FlowPath()),
        (matching.VariancePreservingConditionalFlowMatcher(0.0), VPPath("cosine")),
    ):
        _, point, velocity = matcher.sample_location_and_conditional_flow(noise, data, t=t)
        model = from_torchcfm(lambda t, x: velocity, path=path)  # noqa: B023
        assert_close(path.interpolate(data, noise, 1 - t), point)
        assert_close(model.target(data, noise, 1 - t), -velocity)
        assert_close(model.predict(point, 1 - t), Prediction(data, noise), rtol=1e-3, atol=1e-4)


def test_torchcfm_models_sample_where_their_ode_ends():
    "Euler in their time, forwards, by hand, against our sampler."
    read = nn.Linear(3, 2)

    class Net(nn.Module):
        def forward(self, t, x, y):
            return torch.tanh(read(torch.cat([x, t[:, None]], 1)) + y[:, None])

    model, labels, x = from_torchcfm(Net(), 3), torch.tensor([0, 1, 2, 1]), torch.randn(4, 2)
    ours = sample(model, labels, (2,), "euler", 10, init=x, progress=False)
    with torch.no_grad():
        for i in range(10):
            x = x + 0.1 * Net()(torch.full((4,), i / 10), x, labels)
    assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_callables_answer_row_by_row_and_train_if_they_can():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.label, self.null = nn.Embedding(3, 2), nn.Parameter(torch.full((2,), 7.0))

        def forward(self, x, t, c):
            return x * 0 + (self.null if c is None else self.label(c))

    model = from_callable(Net(), FlowPath(), "x0", 3)
    x, c, drop = torch.randn(5, 2), torch.tensor([0, 1, 2, 1, 0]), torch.tensor([True, False, True, False, False])
    with count_nfe() as rows:
        y = model.output(x, 0.5, c, drop)
    assert rows.total == 5
    assert_close(y, torch.where(drop[:, None], torch.full((2,), 7.0), model.net.label(c)))
    train(model, DenoisingLoss(0.5), (torch.ones(8, 2), torch.arange(8) % 3), 150, 8, lr=0.2, ema=0.5, progress=False)
    assert (model.predict(x, 0.5, c).x0 - 1).abs().max() < 0.1 and (model.predict(x, 0.5).x0 - 1).abs().max() < 0.1


def modular(scheduler):
    "A modular SDXL pipeline of tiny parts, and a call of it."
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    parts, pipeline = cases.sdxl(), StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("vae", "unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline.update_components(scheduler=scheduler, **{name: getattr(parts, name) for name in names})
    pipeline.set_progress_bar_config(disable=True)
    for block in (pipeline._blocks, *pipeline._blocks.sub_blocks.values()):
        getattr(block, "set_progress_bar_config", lambda **more: None)(disable=True)
    start = torch.randn(2, 4, 8, 8)

    def call(guider):
        pipeline.update_components(guider=guider)
        size = {"height": 16, "width": 16, "num_inference_steps": 4, "output": "latents"}
        return pipeline(prompt=PROMPTS, latents=start.clone(), **size)

    return call


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_our_guidance_in_a_modular_pipeline(name, kind):
    scheduler = getattr(diffusers, name)(**cases.STABLE_DIFFUSION, prediction_type=kind)
    call, plain = modular(scheduler), lambda model: ClassifierFreeGuidance(model, 3.0)
    theirs = call(TheirGuidance(guidance_scale=3.0))
    assert_close(call(DiffusersGuider(plain, scheduler)), theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
    assert (theirs - call(TheirGuidance(guidance_scale=1.0))).abs().max() > 1e-3 * theirs.abs().max()


@torch.no_grad()
def guided_loop(guider, net, scheduler, x, steps, conditions):
    "The guider protocol in the order of a modular pipeline."
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(step=i, num_inference_steps=steps, timestep=t)
        batches = guider.prepare_inputs({"encoder_hidden_states": conditions})
        for batch in batches:
            guider.prepare_models(net)
            batch.noise_pred = net(x, t, encoder_hidden_states=batch.encoder_hidden_states).sample
            guider.cleanup_models(net)
        x = scheduler.step(guider(batches)[0], t, x).prev_sample
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_with_a_space_and_a_memory_in_a_pipeline(kind):
    "APG acts on clean data and remembers: in a pipeline and in our sampler it must draw the same, twice in a row."
    scheduler, text, null = cases.ddim(prediction_type=kind), torch.randn(2, 5, 8), torch.randn(1, 5, 8)
    model, start = from_diffusers(cases.unet(), scheduler, null), torch.randn(2, 4, 8, 8)
    apg = lambda model: AdaptiveProjectedGuidance(model, 4.0, eta=0.3, norm=3.0, momentum=-0.5)  # noqa: E731
    times = scheduler_times(scheduler, 6)
    ours = sample(apg(model), text, (4, 8, 8), "ddim", times=times, init=start, progress=False)
    guider = DiffusersGuider(apg, scheduler)
    for _ in range(2):
        theirs = guided_loop(guider, model.net, scheduler, start, 6, (text, null.expand(2, -1, -1)))
        assert_close(theirs, ours, rtol=0, atol=1e-4 * ours.abs().max().item())
    linear = ClassifierFreeGuidance(model, 4.0)
    linear = sample(linear, text, (4, 8, 8), "ddim", times=times, init=start, progress=False)
    assert (linear - ours).abs().max() > 1e-2


def test_guidance_that_looks_elsewhere_is_refused():
    class Elsewhere(Denoiser):
        def __init__(self, model, dx=0.0, dt=0.0, dc=0.0):
            super().__init__(model.path, model.num_classes)
            self.model, self.by = model, (dx, dt, dc)

        def forward(self, x, t, c=None):
            return self.model.predict(x + self.by[0], t - self.by[1], None if c is None else c + self.by[2])

    scheduler, text = cases.ddim(), torch.randn(2, 5, 8)
    net, start = cases.unet(), torch.randn(2, 4, 8, 8)
    for by, what in (({"dx": 0.1}, "point"), ({"dt": 0.01}, "point"), ({"dc": 1.0}, "condition")):
        guider = DiffusersGuider(lambda model, by=by: Elsewhere(model, **by), scheduler)
        refuse(lambda: guided_loop(guider, net, scheduler, start, 3, (text, text)), f"asks for another {what}; allowed")  # noqa: B023
    off = DiffusersGuider(Elsewhere, scheduler)
    off.disable()  # by hand: the SDXL blocks of diffusers 0.42 enable a disabled guider again, half-way
    assert_close(guided_loop(off, net, scheduler, start, 3, (text, None)), loop(scheduler, net, start, 3, text))
    fine = guided_loop(DiffusersGuider(Elsewhere, scheduler), net, scheduler, start, 3, (text, text))
    assert fine.isfinite().all() and not net._forward_pre_hooks
    replay, pair = PipelineDenoiser(FlowPath()), Prediction(torch.zeros(2, 3), torch.ones(2, 3))
    weak = NetworkDenoiser(nn.Identity(), FlowPath(), 3)
    c = replay.load(torch.zeros(2, 3), torch.tensor(0.5), {(True, frozenset()): pair})
    with pytest.raises(ValueError, match="allowed: a LongTensor"):  # another model cannot mistake it for a class
        weak.predict(torch.zeros(2, 3), 0.5, c)
    refuse(lambda: DiffusersGuider(lambda m: m, diffusers.EDMEulerScheduler()), "scheduler = 'EDMEulerScheduler'")


def hub_model(**options):
    model = image_denoiser("unet-tiny", (1, 8, 8), VPPath("cosine"), 3, "v", widths=[8, 16], **options)
    return cases.stirred(model)


def test_a_hub_folder_is_the_model_and_its_card_runs(tmp_path):
    model = hub_model()
    needs = "from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance"
    how = {"guidance": "ClassifierFreeGuidance(model, 2.0)", "imports": needs, "sampler": "ddim", "sampler_steps": 3}
    facts = TrainingFacts("plain", 200, 12800, "digits", 2.0, **how)
    HubDenoiser.from_denoiser(model, "unet-tiny", (1, 8, 8), {"widths": [8, 16]}, facts).save_pretrained(tmp_path)
    again, card = HubDenoiser.from_pretrained(tmp_path), (tmp_path / "README.md").read_text()
    x, c = torch.randn(3, 1, 8, 8), torch.arange(3)
    assert torch.equal(again.predict(x, 0.3, c).x0, model.predict(x, 0.3, c).x0)
    assert again.path == model.path and again.facts == facts and again.shape == (1, 8, 8) and not again.training
    for words in (
        "plain",
        "12,800 samples seen",
        "200 optimiser steps",
        "e = e_u + scale (e_c - e_u)",
        "at scale 2",
        "digits",
    ):
        assert words in card
    code, scope = card.split("```")[1].removeprefix("python\n"), {}
    exec(code.replace("FOLDER OR HUB NAME", str(tmp_path)).replace('"ddim", 3)', '"ddim", 3, progress=False)'), scope)
    guided = ClassifierFreeGuidance(model, 2.0)
    expected = sample(guided, torch.arange(4) % 3, (1, 8, 8), "ddim", 3, progress=False)
    assert_close(scope["images"], expected)


def test_facts_of_a_card_may_be_given_by_name(tmp_path):
    facts = {"method": "plain", "steps": 300, "scale": 2.0}
    HubDenoiser.from_denoiser(hub_model(), "unet-tiny", (1, 8, 8), {"widths": [8, 16]}, facts).save_pretrained(tmp_path)
    assert HubDenoiser.from_pretrained(tmp_path).facts == TrainingFacts("plain", 300, scale=2.0)


def test_a_hub_folder_with_other_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    HubDenoiser.from_denoiser(hub_model(scale_aware=True), "unet-tiny", (1, 8, 8), {"widths": [8, 16]}).save_pretrained(
        tmp_path
    )
    again = HubDenoiser.from_pretrained(tmp_path)
    assert again.scale_aware and again.facts == TrainingFacts()
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        HubDenoiser.from_pretrained(tmp_path)


def test_every_path_survives_json():
    table = path_from_scheduler(cases.ddim()).path
    for path in (FlowPath(), VPPath(), VPPath("linear", 0.2, 15.0), EDMPath(50.0), table):
        assert path_from_json(json.loads(json.dumps(path_to_json(path)))) == path
    refuse(lambda: path_from_json({"kind": "Loop"}), "path kind = 'Loop'; allowed: 'FlowPath'")
    refuse(lambda: path_to_json(SimpleNamespace()), "path = 'SimpleNamespace'; allowed: 'FlowPath'")


def test_a_trained_recipe_becomes_a_hub_folder(tmp_path):
    "By the call that the notebook gives."
    from guidance_nb.cli._recipe import Recipe, override
    from guidance_nb.cli._run import load_trained, train_recipe
    from guidance_nb.images._data import save_samples

    x = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    save_samples(tmp_path / "images", x, torch.arange(16) % 2)
    changes = {"network": "unet-tiny", "steps": 2, "batch_size": 4, "warmup": 0, "precision": "fp32", "grid_every": 0}
    recipe = override(Recipe(), changes | {"save_every": 2, "data": str(tmp_path / "images"), "path": "vp-linear"})
    for _ in train_recipe(recipe, tmp_path / "run", progress=False):
        pass
    trained = load_trained(tmp_path / "run")
    table = trained.recipe.network
    HubDenoiser.from_denoiser(trained.model, table.name, trained.shape, table.settings).save_pretrained(
        tmp_path / "hub"
    )
    again = HubDenoiser.from_pretrained(tmp_path / "hub")
    noise, c = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    own = trained.model.cpu().predict(noise, 0.4, c)
    assert torch.equal(again.predict(noise, 0.4, c).x0, own.x0)


def test_facts_can_be_given_by_hand():
    "A network of diffusers trained by other means, on a continuous path."
    facts = SchedulerFacts(VPPath("cosine"), "v", _Clock(1000))
    model = from_diffusers(cases.class_unet(), facts)
    x = torch.randn(2, 4, 8, 8)
    expected = model.net(x, torch.tensor([250.0, 250.0])).sample
    assert_close(model.output(x, 0.25), expected)
    assert model.num_classes == 0 and from_diffusers(cases.unet(), facts).num_classes == EMBEDDINGS


@pytest.mark.parametrize("kind", ["text", "several"])
def test_prompts_of_two_lengths_are_refused_at_any_batch_size(kind):
    "In one pass and in two, by guidance and by a loss: the verdict must not hang on how many samples there are."
    text, none = torch.randn(2, 5, 8), torch.zeros(1, 7, 8)
    pooled = {"pooled_projections": torch.randn(2, 6)}
    model, c = {
        "text": lambda: (from_diffusers(cases.unet(), cases.ddim(), none), text),
        "several": lambda: (
            from_diffusers(
                cases.sd3(8, 6),
                diffusers.FlowMatchEulerDiscreteScheduler(),
                {"encoder_hidden_states": none, "pooled_projections": torch.zeros(1, 6)},
            ),
            {"encoder_hidden_states": text} | pooled,
        ),
    }[kind]()
    t = torch.tensor(0.5)
    for n in (2, 200):
        x, many = torch.randn(n, 4, 8, 8), take_rows(c, torch.arange(n) % 2)
        for batching in ("auto", "batched", "sequential"):
            with pytest.raises(ValueError, match=r"c has shape \(\d+, 5, 8\); allowed: \[batch, \.\.\.\] as the null"):
                ClassifierFreeGuidance(model, 3.0, batching=batching)(x, t, many)
        drop = torch.arange(n) == 0
        refuse(lambda: model.output(x, t, many, drop), "as the null condition (1, 7, 8)")  # noqa: B023


def test_a_network_that_has_the_scale_as_an_input_is_told_it():
    "Latent consistency models, and fine-tuned ones: as their pipeline embeds it, 1 unless asked, 0 without condition."
    net = cases.unet(time_cond_proj_dim=8)
    text, seen = torch.randn(2, 5, 8), []
    look = lambda net, args, kwargs: seen.append(kwargs["timestep_cond"])  # noqa: E731
    net.register_forward_pre_hook(look, with_kwargs=True)
    model = from_diffusers(net, cases.ddim(), text[:1] * 0)
    x = torch.randn(2, 4, 8, 8)
    assert model.scale_aware
    for scale in (None, torch.tensor([1.0, 7.5])):
        model.output(x, 0.5, text, torch.tensor([True, False]), scale)
    embed = cases.stable_diffusion().get_guidance_scale_embedding
    assert_close(seen[0], embed(torch.tensor([-1.0, 0.0]), 8))
    assert_close(seen[1], embed(torch.tensor([-1.0, 6.5]), 8))
    fixed = from_diffusers(net, cases.ddim(), text[:1] * 0, guidance=2.5)
    fixed.output(x, 0.5, text)
    assert not fixed.scale_aware
    assert_close(seen[2], embed(torch.tensor([1.5, 1.5]), 8))


def test_copies_of_a_model_share_its_pipeline():
    model = from_diffusers(cases.stable_diffusion())
    twin = copy.deepcopy(model)
    assert twin.parts is model.parts and twin.net is not model.net
    assert not any(name.startswith("parts") for name in model.state_dict())
    both = (each.encode(PROMPTS) for each in (model, twin))
    assert torch.equal(*both) and twin.shape == (4, 8, 8)
