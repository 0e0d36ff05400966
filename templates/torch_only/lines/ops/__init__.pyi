from .losses.smooth_distance import (
    SmoothDistance as SmoothDistance,
    smooth_distance as smooth_distance,
)
