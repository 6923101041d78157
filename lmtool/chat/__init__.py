"""The terminal: a conversation as data, its keys, its rendering, and one protocol to the engine (`backend`)."""
