"""WebAssembly: small modules that read stdin and write stdout, and can reach nothing else.

    wasi.py       the part of WASI preview1 that a module gets: stdin, stdout, stderr, a clock that does not run, chance from a seed
    engine.py     compiles, checks and runs a module in this process (``WasmEngine``, ``run_module``); wasmtime's errors end here
    worker.py     the process (runtimes/lines/worker.py) with that engine
    cargo.py      the node's side (``open_wasm_cargo``)
    build.py      compiles modules/*.c with Debian's clang and pins what comes out by hash

Equal input, seed and module give equal output on every machine: no clock, no environment, canonical NaN, no relaxed SIMD, no threads.
"""
