"Our guidance in whole modular pipelines of diffusers, against our own sampling; and what their guiders do."

import copy
import functools
from types import SimpleNamespace

import diffusers
import diffusers.guiders as theirs
import diffusers_cases as cases
import pytest
import torch
from diffusers import modular_pipelines
from torch.testing import assert_close

import guidance_nb as gnb
from guidance_nb.denoisers import EMBEDDINGS
from guidance_nb.guidance import linear_schedule
from guidance_nb.guidance_variants import cfgpp_scales
from guidance_nb.interop._functions import from_callable
from guidance_nb.interop._guider import DiffusersGuider
from guidance_nb.interop._schedulers import scheduler_times
from guidance_nb.weak_models import (
    Autoguidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)

PROMPTS, STEPS, SIZE = ["a cat", "two dogs"], 3, 16
METHODS = {
    "plain": (gnb.ClassifierFreeGuidance, {"scale": 3.0}),
    "interval": (gnb.ClassifierFreeGuidance, {"scale": 3.0, "interval": (0.5, 0.9)}),
    "schedule": (gnb.ClassifierFreeGuidance, {"scale": linear_schedule(3.0)}),
    "scales": (gnb.ClassifierFreeGuidance, {"scale": torch.tensor([2.0, 4.0])}),
    "one": (gnb.ClassifierFreeGuidance, {"scale": 1.0}),
    "zero": (gnb.ClassifierFreeGuidance, {"scale": 0.0}),
    "rescaled": (gnb.RescaledGuidance, {"scale": 3.0, "phi": 0.5}),
    "projected": (gnb.AdaptiveProjectedGuidance, {"scale": 3.0, "eta": 0.3, "norm": 2.0, "momentum": -0.5}),
    "zero star": (gnb.CFGZeroStar, {"scale": 3.0}),
    "tangential": (gnb.TangentialGuidance, {"scale": 3.0}),
    "magnitude": (gnb.MagnitudeAwareGuidance, {"scale": 3.0}),
    "rectified": (gnb.RectifiedGuidance, {"scale": 3.0, "ratios": 0.9}),
    "thresholded": (gnb.DynamicThresholding, {"scale": 3.0}),
    "frequencies": (gnb.FrequencyDecoupledGuidance, {"scale": 3.0, "shares": (1.0, 0.5)}),
}


def host(pipeline, parts, model, c, times, shape, **call):
    "A modular pipeline, our model of the same network, and how to sample with each."
    net = parts.get("unet") or parts["transformer"]
    with torch.no_grad():
        for name, weight in net.named_parameters():  # so that text and attention matter
            if any(part in name for part in ("attn", "context_embedder", "add_embedding")):
                weight.mul_(40 if "attn1.to_q" in name or "attn1.to_k" in name else 8)
    pipeline.update_components(**parts)
    for block in (pipeline._blocks, *pipeline._blocks.sub_blocks.values()):
        getattr(block, "set_progress_bar_config", lambda **_: None)(disable=True)
    start = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def run(guider, **more):
        pipeline.update_components(guider=guider)
        size = {"num_inference_steps": STEPS, "output": "latents", "latents": start.clone()}
        return pipeline(**{**size, **call, **more})

    def own(guided):
        return gnb.sample(guided, c, shape, "ddim", times=times, init=start, progress=False)

    return SimpleNamespace(pipeline=pipeline, run=run, own=own, model=model, call=call)


def text_host(blocks, parts, network, **options):
    names = (network, "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    model = gnb.from_diffusers(parts, null="bad", size=SIZE)
    return host(
        blocks().init_pipeline(), {name: getattr(parts, name) for name in names}, model, model.encode(PROMPTS),
        scheduler_times(parts.scheduler, STEPS), model.shape,
        prompt=PROMPTS, negative_prompt=["bad", "bad"], height=SIZE, width=SIZE, **options,
    )  # fmt: skip


def flux2_host():
    "The denoising of Flux 2 Klein, with embeddings given; Flux 1 has no guider, for it takes the scale as an input."
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "timestep_guidance_channels": 8}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 2, 2)}
    net = diffusers.Flux2Transformer2DModel(**sizes, **heads, joint_attention_dim=8, guidance_embeds=False)
    net, (text, null) = cases.stirred(net), torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(1))
    text, null = torch.cat([text, 2 * text]), torch.cat([null, null])
    where = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4), torch.arange(1)).expand(2, -1, -1)
    words = torch.cartesian_prod(*[torch.arange(1)] * 3, torch.arange(5)).expand(2, -1, -1)

    class Velocity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, c):
            said, rows = null[: len(x)] if c is None else c, slice(len(x))
            out = self.net(x.flatten(2).mT, said, t.float(), where[rows], words[rows], return_dict=False)[0]
            return out.mT.reshape(x.shape)

    pipeline = modular_pipelines.Flux2KleinBaseAutoBlocks()
    for name in ("text_encoder", "vae_encoder", "decode"):
        pipeline.sub_blocks.pop(name)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = from_callable(Velocity(), gnb.FlowPath(), "velocity", EMBEDDINGS)
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    return host(
        pipeline.init_pipeline(), {"transformer": net, "scheduler": scheduler}, model, text, times, (16, 4, 4),
        prompt_embeds=text, negative_prompt_embeds=null, height=64, width=64,
    )  # fmt: skip


@functools.lru_cache(1)
def made(kind):
    if kind == "sdxl":
        return text_host(modular_pipelines.StableDiffusionXLAutoBlocks, cases.sdxl(), "unet")
    if kind == "sd3":
        return text_host(modular_pipelines.StableDiffusion3AutoBlocks, cases.stable_diffusion_3(), "transformer")
    return flux2_host()


def equal(kind, guider, guided, extra=0):
    "The same latents to rounding by the same number of evaluations; whatever was run before."
    with gnb.count_nfe() as there:
        latents = made(kind).run(guider)
    with gnb.count_nfe() as here:
        ours = made(kind).own(guided)
    assert_close(latents, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    assert there.total == here.total + extra
    return latents, there.total


SPACES = ["plain", "interval", "scales", "one", "zero", "projected", "zero star"]


@pytest.mark.parametrize("kind, names", [("sdxl", SPACES), ("sd3", METHODS), ("flux2", SPACES)])
def test_every_method_of_one_pair_draws_in_a_pipeline_what_it_draws_in_our_sampler(kind, names):
    it, drawn = made(kind), {}
    for name in names:
        method, settings = METHODS[name]
        still = 2 if name == "zero star" and kind != "sdxl" else 0  # a pipeline cannot skip a step, at time 1
        guided = method(it.model, **settings)
        guided.batching = "sequential"  # as pipelines do: a batch of both rounds otherwise, and the network enlarges it
        drawn[name] = equal(kind, DiffusersGuider(method, it.pipeline, **settings), guided, still)
    plain = drawn["plain"][0]
    assert drawn["plain"][1] == 2 * STEPS * gnb.ClassifierFreeGuidance.claims.nfe
    assert drawn["one"][1] == drawn["zero"][1] == 2 * STEPS < drawn["interval"][1] < drawn["plain"][1]
    for name, (latents, _) in drawn.items():
        assert name == "plain" or (latents - plain).abs().max() > 2e-4 * plain.abs().max(), name


def test_cfg_plus_plus_is_a_schedule_of_scales_and_no_guider_of_its_own():
    it, times = made("sdxl"), scheduler_times(made("sdxl").pipeline.scheduler, STEPS)
    with pytest.raises(ValueError, match=r"method = 'CFGPlusPlus'; allowed: .*cfgpp_scales") as caught:
        DiffusersGuider(gnb.CFGPlusPlus, it.pipeline, scale=0.6)
    assert "\n" not in str(caught.value)
    scales = cfgpp_scales(it.model.path, times, 0.6)
    guider = DiffusersGuider(
        gnb.ClassifierFreeGuidance, it.pipeline, scale=lambda t: scales[(times[:-1] - t).abs().argmin()]
    )
    ours = it.own(gnb.CFGPlusPlus(it.model, 0.6))
    assert_close(it.run(guider), ours, rtol=0, atol=1e-5 * ours.abs().max().item())


ATTENTION = "mid_block.attentions.0.transformer_blocks"


@pytest.mark.parametrize("kind, method, settings", [
    ("sdxl", PerturbedAttentionGuidance, {"layers": ATTENTION}),
    ("sdxl", PerturbedAttentionGuidance, {"layers": ATTENTION, "cfg_scale": 3.0, "interval": (0.0, 0.5)}),
    ("sdxl", SmoothedEnergyGuidance, {"layers": "attn1", "cfg_scale": 3.0}),
    ("sdxl", SkipLayerGuidance, {"layers": ATTENTION, "cfg_scale": 3.0}),
    ("sd3", SkipLayerGuidance, {"layers": 0, "cfg_scale": 3.0}),
    ("flux2", SkipLayerGuidance, {"layers": 0, "cfg_scale": 3.0}),
])  # fmt: skip
def test_guidance_away_from_changed_layers_changes_them_in_a_pipeline(kind, method, settings):
    it = made(kind)
    before = {name: vars(part).get("forward") for name, part in it.model.net.named_modules()}
    guider = DiffusersGuider(method, it.pipeline, scale=3.0, **settings)
    latents, _ = equal(kind, guider, method(it.model, scale=3.0, **settings))
    plain = it.own(gnb.ClassifierFreeGuidance(it.model, settings.get("cfg_scale", 1.0)))
    assert (latents - plain).abs().max() > 2e-4 * plain.abs().max()
    assert before == {name: vars(part).get("forward") for name, part in it.model.net.named_modules()}


def test_autoguidance_in_a_pipeline_takes_a_weaker_network():
    it = made("sdxl")
    weak = cases.stirred(copy.deepcopy(it.model.net), seed=1)
    ours = Autoguidance(
        it.model, gnb.from_diffusers(weak, it.pipeline.scheduler, it.model.null, SIZE), 1.5, cfg_scale=2.0
    )
    equal("sdxl", DiffusersGuider(Autoguidance, it.pipeline, weak=weak, scale=1.5, cfg_scale=2.0), ours)


def test_a_failing_network_is_left_as_it_was():
    it = made("sdxl")
    guider = DiffusersGuider(SkipLayerGuidance, it.pipeline, layers=ATTENTION, scale=3.0)
    calls = iter([False, True])
    fail = it.model.net.conv_out.register_forward_pre_hook(lambda *_: 1 / 0 if next(calls, True) else None)
    with pytest.raises(ZeroDivisionError):
        it.run(guider)
    fail.remove()
    equal(
        "sdxl",
        DiffusersGuider(gnb.ClassifierFreeGuidance, it.pipeline, scale=3.0),
        gnb.ClassifierFreeGuidance(it.model, 3.0),
    )


class Fickle(gnb.ClassifierFreeGuidance):
    "Asks for the unconditional prediction where the conditional one is not zero."

    def guided(self, x, t, c):
        return super().guided(x, t, c) if self.model(x, t, c).x0.any() else self.model(x, t, c)


def test_bad_input_is_told_in_one_line():
    it, plain = made("sdxl"), gnb.ClassifierFreeGuidance
    other = SimpleNamespace(scheduler=it.pipeline.scheduler, unet=cases.unet())
    pag = functools.partial(DiffusersGuider, PerturbedAttentionGuidance, layers=7)
    for make, words in (
        (lambda: DiffusersGuider(plain, it.pipeline, scale="3"), "scale"),
        (lambda: DiffusersGuider(plain, it.pipeline, interval=(0.8, 0.2)), "interval"),
        (lambda: pag(it.pipeline), "layers = 7; allowed: 0 to"),
        (lambda: pag(modular_pipelines.StableDiffusionXLAutoBlocks().init_pipeline()), "'NoneType'.*, loaded"),
        (lambda: it.run(DiffusersGuider(Fickle, it.pipeline, scale=3.0)), "guidance asks for another pass; allowed"),
        (lambda: pag(it.pipeline.scheduler), "layers = 7; allowed: no layer is there"),
        (lambda: DiffusersGuider(Autoguidance, it.pipeline.scheduler, weak=other.unet), "source = 'DDIMScheduler'"),
        (lambda: it.run(DiffusersGuider(plain, other, scale=3.0)), "network = 'UNet2DConditionModel'; allowed"),
        (lambda: made("sd3").run(DiffusersGuider(plain, made("sd3").pipeline, scale=3.0), negative_prompt=None),
         "negative prompt = None; allowed: a text"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_a_state_of_blocks_says_the_same_as_a_mapping():
    guider = DiffusersGuider(gnb.ClassifierFreeGuidance, made("sdxl").pipeline, scale=3.0)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(500))
    state = modular_pipelines.modular_pipeline.BlockState(text=torch.ones(1, 2), no_text=torch.zeros(1, 2))
    assert "num_conditions: 2" in str(guider)
    from_state = guider.prepare_inputs_from_block_state(state, {"c": ("text", "no_text"), "image": "nothing"})
    from_mapping = guider.prepare_inputs({"c": (state.text, state.no_text), "image": None})
    assert [(str(b), b.c.tolist()) for b in from_state] == [(str(b), b.c.tolist()) for b in from_mapping]
    assert [b.c.tolist() for b in from_state] == [[[1, 1]], [[0, 0]]]


def test_guiders_of_diffusers_that_fail_in_its_pipelines():
    "What page 35 says of whole pipelines in diffusers 0.42.1; a version that mends one of them fails here."
    it, half = made("sdxl"), theirs.ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5)
    it.run(half, negative_prompt=None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):
        it.run(half, negative_prompt=None)  # after a run whose last step is not guided
    ours = DiffusersGuider(gnb.ClassifierFreeGuidance, it.pipeline, scale=3.0, interval=(0.5, 1.0))
    first = it.run(ours, negative_prompt=None)
    assert_close(it.run(ours, negative_prompt=None), first, rtol=0, atol=0)
    flow = [made("sd3").run(theirs.ClassifierFreeGuidance(guidance_scale=s), negative_prompt=None) for s in (1.0, 7.0)]
    assert_close(*flow, rtol=0, atol=0)  # without a negative prompt there is no guidance
    empty = made("sd3").run(theirs.ClassifierFreeGuidance(guidance_scale=7.0), negative_prompt="")
    assert (empty - flow[0]).abs().max() > 0.01


def test_magnitude_aware_guidance_of_diffusers_works_on_rows_of_tokens_alone():
    it = made("flux2")
    latents = it.run(theirs.MagnitudeAwareGuidance(guidance_scale=3.0))
    ours = it.own(gnb.MagnitudeAwareGuidance(it.model, 3.0))
    assert_close(latents, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    with pytest.raises(RuntimeError, match="dim must be a 2-tuple"):
        made("sdxl").run(theirs.MagnitudeAwareGuidance(guidance_scale=3.0))


def test_a_band_at_scale_one_fails_in_frequency_decoupled_guidance_of_diffusers():
    "Which elsewhere is ours; `kornia` is no requirement of this package."
    pytest.importorskip("kornia")
    it, bands = made("sdxl"), theirs.FrequencyDecoupledGuidance
    latents = it.run(bands(guidance_scales=[3.0, 2.0]))
    ours = it.own(gnb.FrequencyDecoupledGuidance(it.model, 3.0, shares=(1.0, 0.5)))
    assert_close(latents, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    with pytest.raises(RuntimeError, match="The size of tensor"):
        it.run(bands(guidance_scales=[3.0, 1.0]))
