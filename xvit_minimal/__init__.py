"""X-ViT from first principles: the package that the book of that name derives."""

from .attention import SoftmaxAttention, XNormAttention, softmax_attention, xnorm, xnorm_attention

__version__ = "0.1.0"
__all__ = ["SoftmaxAttention", "XNormAttention", "softmax_attention", "xnorm", "xnorm_attention"]
