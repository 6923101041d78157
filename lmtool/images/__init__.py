"""Pictures on their way to a model: read under limits, cut into what a vision tower takes. Knows neither torch nor HTTP
routes."""
