"""Cargos that give lines from a worker process: the worker's loop, the node's side of it, and what keeps it alive."""
