"""Many pictures as one; by hand, since torchvision takes longer to import than a hundred digits to draw."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def tile(
    x: Tensor,  # Images `[n, channels, height, width]`
    columns: int,  # Images in a row
    line: float = 0.0,  # Value of the lines of one pixel around each, and of what stays empty
) -> Tensor:  # One image `[channels or 1, height, width]`
    "Images as a grid; channels that are neither grey nor RGB stand side by side."
    x = x if x.shape[1] in (1, 3) else x.transpose(1, 2).flatten(2)[:, None]
    columns = min(columns, len(x))
    framed = pad(x, (1, 0, 1, 0), value=line)
    framed = torch.cat([framed, framed.new_full((-len(x) % columns, *framed.shape[1:]), line)])
    cells = framed.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)
    return pad(cells.flatten(3).flatten(1, 2), (0, 1, 0, 1), value=line)
