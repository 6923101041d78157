"""HTTP in front of the engine, which runs in a process of its own. Knows neither torch nor the scheduler."""
