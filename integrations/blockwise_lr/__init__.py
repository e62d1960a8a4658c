"""Blockwise learning rates for Transformer pre-training (arXiv 2502.19002)."""
__version__ = "0.1.0"
