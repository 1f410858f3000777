"""Images: data and sample files, networks by name, feature extractors, metrics, and latents; one module each."""

from guidance_nb._lazy import offer

__all__, __getattr__, __dir__ = offer(__name__, __file__)
