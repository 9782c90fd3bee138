"""What the random projections of LoRA do to gradients, and what they prove about privacy."""

__version__ = "0.1.0.dev0"
