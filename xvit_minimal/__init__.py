"""X-ViT from first principles: the package that the book of that name derives."""

from .attention import SoftmaxAttention, XNormAttention, softmax_attention, xnorm, xnorm_attention
from .model import XViT, xvit_base, xvit_medium, xvit_nano, xvit_pico, xvit_small, xvit_tiny

__version__ = "0.1.0"
__all__ = [
    "SoftmaxAttention",
    "XNormAttention",
    "softmax_attention",
    "xnorm",
    "xnorm_attention",
    "XViT",
    "xvit_base",
    "xvit_medium",
    "xvit_nano",
    "xvit_pico",
    "xvit_small",
    "xvit_tiny",
]
