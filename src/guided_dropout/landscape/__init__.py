"""The loss around a model's weights: directions, masks, grids of losses, and numbers that go with the pictures."""

from guided_dropout.landscape.curvature import hessian_directions
from guided_dropout.landscape.directions import Direction, gaussian_direction, toward
from guided_dropout.landscape.landscape import Landscape
from guided_dropout.landscape.masks import Mask
from guided_dropout.landscape.measure import loss_landscape

__all__ = [
    "Direction",
    "Landscape",
    "Mask",
    "gaussian_direction",
    "hessian_directions",
    "loss_landscape",
    "toward",
]
