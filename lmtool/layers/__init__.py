"""How a matrix is stored, and thin pieces over `kernels`. Knows neither checkpoints nor the engine."""
