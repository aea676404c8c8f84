"""HTTP around one model: OpenAI-compatible chat completions on loopback."""
