"""The GGUF engine: llama.cpp's low-level API in a worker process, many answers at a time, for the whole model or a range of its layers.

    cargo.py      trio side: spawns the worker, supervises it, hands out events (``open_gguf_cargo``)
    messages.py   what passes between node and worker
    worker.py     the process: a reader thread, the engine's loop, nothing else
    engine.py     the loop's one step: what to compute, compute it, choose tokens
    scheduler.py, kv.py, budget.py, sampler.py, detokenize.py, template.py   decisions, without native code
    grammar.py, grammar_check.py                                           JSON schemas; compiled first in a throw-away process
    layers.py     a stage: a range of layers from token ids or hidden states to logits or hidden states
    llama.py, gpu.py   the thin typed shell over llama.cpp; foreign errors end here
"""
