"""Models of other projects: diffusers, Stable Diffusion, torchcfm, the Hub, and functions of your own."""

from guidance_nb._lazy import offer

__all__, __getattr__, __dir__ = offer(__name__, __file__)
