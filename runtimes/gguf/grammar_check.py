"""GBNF for a JSON schema, tried in a throw-away process first. (in work)"""
from __future__ import annotations
class GrammarShop:
    def __init__(self, model_path: str, environment: dict[str, str]) -> None:
        self._model_path = model_path
    async def gbnf(self, schema: str) -> str:
        raise NotImplementedError
