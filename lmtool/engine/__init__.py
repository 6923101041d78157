"""The one inference engine: requests in, token ids out. schedule → run → finish."""
