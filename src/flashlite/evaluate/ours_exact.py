"""flashlite with every logit computed, as a measured engine; see worker.py."""

from __future__ import annotations

from flashlite.evaluate import ours

__all__ = ["Model"]


class Model(ours.Model):
    """As `ours.Model`, the split head left out."""

    exact_head = True
