"Tiny randomly initialised networks and pipelines of diffusers, built from configurations."

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import logging
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

logging.set_verbosity_error()

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def stirred(net, seed=0):
    "Random weights everywhere, in evaluation mode."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    return net.eval()


def unet(cross=8, **more):
    "A text-conditioned U-Net."
    return stirred(
        UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=cross, attention_head_dim=4, **more,
        )
    )  # fmt: skip


def class_unet(**more):
    "A U-Net without text."
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16)}
    return stirred(UNet2DModel(**sizes, **blocks, norm_num_groups=4, layers_per_block=1, **more))


def dit(classes=1000, channels=8):
    "A DiT with a learned variance."
    heads = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}
    return stirred(DiTTransformer2DModel(
        **heads, in_channels=4, out_channels=channels, sample_size=8, num_embeds_ada_norm=classes, norm_num_groups=4,
    ))  # fmt: skip


def sd3(text=8, pooled=16):
    "An SD3 transformer."
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "caption_projection_dim": 16}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    return stirred(SD3Transformer2DModel(**heads, **sizes, joint_attention_dim=text, pooled_projection_dim=pooled))


def flux(text=8, pooled=8, **more):
    "A Flux transformer."
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1}
    sizes = {"in_channels": 16, "joint_attention_dim": text, "pooled_projection_dim": pooled}
    return stirred(FluxTransformer2DModel(**heads, **sizes, axes_dims_rope=(2, 2, 4), **more))


def vae(**more):
    "An autoencoder that halves the edge."
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return stirred(AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, **blocks, **more))


def clip(projected=False, width=8, seed=0):
    "A CLIP text encoder and its tokenizer, which knows letters."
    letters = [chr(i) for i in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": 8}
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, **sizes, **ends)
    return stirred((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed), tokenizer


def t5():
    "A T5 encoder and its tokenizer, which knows letters."
    letters = [(chr(i), -3.0) for i in range(97, 123)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(vocab)}
    return stirred(T5EncoderModel(T5Config(**sizes))), T5Tokenizer(vocab=vocab, extra_ids=0)


def ddim(**more):
    "Stable Diffusion's scheduler, without clipping."
    options = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False, **more}
    return DDIMScheduler(**STABLE_DIFFUSION, **options)


def stable_diffusion(scheduler=None):
    "A Stable Diffusion pipeline."
    (encoder, tokenizer), parts = clip(), (unet(), scheduler or ddim())
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return quiet(StableDiffusionPipeline(vae(), encoder, tokenizer, *parts, **off))


def sdxl():
    "An SDXL pipeline; its second encoder has a projection."
    one, two = clip(), clip(projected=True, seed=1)
    net = unet(16, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)
    encoders = {"text_encoder": one[0], "text_encoder_2": two[0], "tokenizer": one[1], "tokenizer_2": two[1]}
    return quiet(StableDiffusionXLPipeline(vae=vae(), unet=net, scheduler=ddim(), add_watermarker=False, **encoders))


def stable_diffusion_3():
    "An SD3 pipeline without its third encoder."
    one, two = clip(projected=True), clip(projected=True, seed=1)
    first = {"text_encoder": one[0], "tokenizer": one[1], "text_encoder_2": two[0], "tokenizer_2": two[1]}
    third = {"text_encoder_3": None, "tokenizer_3": None}
    scheduler, decoder = FlowMatchEulerDiscreteScheduler(shift=3.0), vae(shift_factor=0.06)
    return quiet(StableDiffusion3Pipeline(sd3(16), scheduler, decoder, **first, **third))


def flux_pipeline(**more):
    "A Flux pipeline."
    one, two = clip(), t5()
    encoders = {"text_encoder": one[0], "tokenizer": one[1], "text_encoder_2": two[0], "tokenizer_2": two[1]}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(FluxPipeline(scheduler, vae(shift_factor=0.1), transformer=flux(**more), **encoders))


def dit_pipeline():
    "A DiT pipeline with a thousand classes, which its null label needs."
    return quiet(DiTPipeline(dit(), vae(), ddim(), id2label={0: "cat, tabby", 1: "dog"}))


def quiet(pipeline):
    "The same without a progress bar."
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
