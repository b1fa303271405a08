"""Training of MoE diffusion language models with the block-diffusion objective."""
