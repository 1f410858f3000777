from ._checkpoints import read_checkpoint as read_checkpoint
from ._cost import cost_sheet as cost_sheet
from ._cost import launch_file as launch_file
from ._run import Engine as Engine
