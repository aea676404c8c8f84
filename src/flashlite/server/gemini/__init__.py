"""Gemini's protocol: content, tokens, embeddings, and cached contents."""

from __future__ import annotations

from flashlite.server.gemini.routes import routes

__all__ = ["routes"]
