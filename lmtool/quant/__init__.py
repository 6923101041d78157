"""Calibrate, search, round, write: a model to W4A16 with a measured loss. Runs models, never the engine."""
