"""Runtimes execute Cargos. Each loaded Cargo is a ``LoadedCargo``; native code runs in worker processes of its own."""
