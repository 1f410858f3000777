from ._diffusers import from_diffusers as from_diffusers
from ._functions import from_callable as from_callable
from ._functions import from_torchcfm as from_torchcfm
from ._grids import compare_scales as compare_scales
from ._guider import DiffusersGuider as DiffusersGuider
from ._hub import HubDenoiser as HubDenoiser
from ._schedulers import scheduler_times as scheduler_times
from ._stable_diffusion import finetune as finetune
