"""The shapes of ``/v1/models``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.http.errors import ApiError

OWNER = "archipelag"


def model_list(cargos: Mapping[str, int]) -> dict[str, Any]:
    """``cargos``: name -> Unix time in seconds since when it is offered."""
    return {"object": "list", "data": [_model(name, cargos[name]) for name in sorted(cargos)]}


def model(cargos: Mapping[str, int], name: str) -> dict[str, Any]:
    """Raises ApiError 404."""
    if name not in cargos:
        raise ApiError(404, f"no Island offers the model {name[:128]!r}", code="model_not_found", param="model")
    return _model(name, cargos[name])


def _model(name: str, created_s: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_s, "owned_by": OWNER}
