"""Runs that are resumed, compiled and divided: checkpoints, costs, CUDA graphs, and the engine behind `fit`."""

from guidance_nb._lazy import offer

__all__, __getattr__, __dir__ = offer(__name__, __file__)
