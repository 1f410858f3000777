"""Guidance in diffusion and flow models: `import guidance_nb as gnb` offers what most uses need.

Its names stand in `__init__.pyi`, by part. Each is imported from its module when it is first asked for, so the package
itself costs nothing.
"""

from ._lazy import offer

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = offer(__name__, __file__)
