"""OpenAI's protocol: chat completions and models."""

from __future__ import annotations

from flashlite.server.openai.routes import routes

__all__ = ["routes"]
