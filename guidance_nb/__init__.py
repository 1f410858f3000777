"""Guidance in diffusion and flow models: `import guidance_nb as gnb` offers what most uses need.

Each name is imported from its module when it is first asked for, so the package itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers, who read the names here
    from .aligned_loss import AlignedLoss as AlignedLoss
    from .classifier_free_guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
    from .classifier_guidance import ClassifierGuidance as ClassifierGuidance
    from .cli.load import load as load
    from .denoisers import Denoiser as Denoiser
    from .denoisers import NetworkDenoiser as NetworkDenoiser
    from .denoisers import Prediction as Prediction
    from .denoisers import count_nfe as count_nfe
    from .editing import inpaint as inpaint
    from .flow_postprocessing import FlowPostprocessor as FlowPostprocessor
    from .guidance import Guidance as Guidance
    from .guidance_variants import AdaptiveProjectedGuidance as AdaptiveProjectedGuidance
    from .guidance_variants import CFGPlusPlus as CFGPlusPlus
    from .guidance_variants import CFGZeroStar as CFGZeroStar
    from .guidance_variants import DynamicThresholding as DynamicThresholding
    from .guidance_variants import FrequencyDecoupledGuidance as FrequencyDecoupledGuidance
    from .guidance_variants import MagnitudeAwareGuidance as MagnitudeAwareGuidance
    from .guidance_variants import RectifiedGuidance as RectifiedGuidance
    from .guidance_variants import RescaledGuidance as RescaledGuidance
    from .guidance_variants import TangentialGuidance as TangentialGuidance
    from .images.networks import image_denoiser as image_denoiser
    from .interop.diffusers import from_diffusers as from_diffusers
    from .loss_guidance import LossGuidance as LossGuidance
    from .mixtures import ExactClassifier as ExactClassifier
    from .mixtures import ExactDenoiser as ExactDenoiser
    from .mixtures import Mixture as Mixture
    from .mixtures import checkerboard as checkerboard
    from .mixtures import digits as digits
    from .mixtures import fractal as fractal
    from .mixtures import gaussian_pair as gaussian_pair
    from .model_guidance import FixedScale as FixedScale
    from .model_guidance import ModelGuidanceLoss as ModelGuidanceLoss
    from .networks import mlp_denoiser as mlp_denoiser
    from .paths import EDMPath as EDMPath
    from .paths import FlowPath as FlowPath
    from .paths import Path as Path
    from .paths import VPPath as VPPath
    from .paths import change_path as change_path
    from .power_tilt import CharacteristicGuidance as CharacteristicGuidance
    from .power_tilt import PredictorCorrector as PredictorCorrector
    from .samplers import Trajectory as Trajectory
    from .samplers import sample as sample
    from .samplers import sample_trajectory as sample_trajectory
    from .several_conditions import ComposedConditions as ComposedConditions
    from .trained_guidance import GuidanceFreeTrainingLoss as GuidanceFreeTrainingLoss
    from .trained_guidance import GuidedDistillationLoss as GuidedDistillationLoss
    from .trained_guidance import MeanFlowGuidanceLoss as MeanFlowGuidanceLoss
    from .training import ClassifierLoss as ClassifierLoss
    from .training import DenoisingLoss as DenoisingLoss
    from .training import fit as fit
    from .training import train as train
    from .weak_models import CADS as CADS
    from .weak_models import Autoguidance as Autoguidance
    from .weak_models import DiscriminatorGuidance as DiscriminatorGuidance
    from .weak_models import IndependentConditionGuidance as IndependentConditionGuidance
    from .weak_models import PerturbedAttentionGuidance as PerturbedAttentionGuidance
    from .weak_models import SelfAttentionGuidance as SelfAttentionGuidance
    from .weak_models import SkipLayerGuidance as SkipLayerGuidance
    from .weak_models import SmoothedEnergyGuidance as SmoothedEnergyGuidance
    from .weak_models import WeakGuidance as WeakGuidance

# Module -> its names, for whoever runs the package. `make lint` sees that both lists agree.
_NAMES = {
    "paths": "Path FlowPath VPPath EDMPath change_path",
    "denoisers": "Prediction Denoiser NetworkDenoiser count_nfe",
    "mixtures": "Mixture ExactDenoiser ExactClassifier gaussian_pair fractal checkerboard digits",
    "samplers": "sample sample_trajectory Trajectory",
    "images.networks": "image_denoiser",
    "networks": "mlp_denoiser",
    "training": "DenoisingLoss ClassifierLoss fit train",
    "guidance": "Guidance",
    "classifier_guidance": "ClassifierGuidance",
    "classifier_free_guidance": "ClassifierFreeGuidance",
    "aligned_loss": "AlignedLoss",
    "model_guidance": "ModelGuidanceLoss FixedScale",
    "flow_postprocessing": "FlowPostprocessor",
    "guidance_variants": (
        "RescaledGuidance MagnitudeAwareGuidance CFGZeroStar TangentialGuidance AdaptiveProjectedGuidance "
        "FrequencyDecoupledGuidance DynamicThresholding RectifiedGuidance CFGPlusPlus"
    ),
    "weak_models": (
        "WeakGuidance Autoguidance PerturbedAttentionGuidance SmoothedEnergyGuidance SkipLayerGuidance "
        "SelfAttentionGuidance CADS DiscriminatorGuidance IndependentConditionGuidance"
    ),
    "power_tilt": "CharacteristicGuidance PredictorCorrector",
    "trained_guidance": "MeanFlowGuidanceLoss GuidanceFreeTrainingLoss GuidedDistillationLoss",
    "loss_guidance": "LossGuidance",
    "several_conditions": "ComposedConditions",
    "editing": "inpaint",
    "interop.diffusers": "from_diffusers",
    "cli.load": "load",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_MODULES]

if not TYPE_CHECKING:  # so that a type checker knows the names above and no others

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'guidance_nb' has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})
