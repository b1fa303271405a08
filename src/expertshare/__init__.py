"""expertshare: Mixture-of-Experts diffusion language models with expert sharing."""

__version__ = "0.1.0"
