"""WebAssembly: small modules that read stdin and write stdout, and can reach nothing else.

    wasi.py       the part of WASI preview1 that a module gets: stdin, stdout, stderr, a clock that does not run, chance from a seed
    engine.py     compiles, checks and runs a module in this process (``WasmEngine``, ``run_module``); wasmtime's errors end here
    messages.py   what passes between node and worker
    worker.py     the process: a reader thread, and the engine in the main thread
    process.py    trio side: one life of a worker, and a lane that keeps one alive
    cargo.py      trio side: jobs over lanes (``open_wasm_cargo``)
    build.py      compiles modules/*.c with Debian's clang and pins what comes out by hash

Equal input, seed and module give equal output on every machine: no clock, no environment, canonical NaN, no relaxed SIMD, no threads.
"""
