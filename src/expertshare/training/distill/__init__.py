"""Self-distillation: a model learns to give its own answers under an expert-sharing policy (arXiv 2605.30876)."""
