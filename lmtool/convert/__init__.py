"""Any checkpoint into the engine's own format and back, checked. Runs no engine."""
