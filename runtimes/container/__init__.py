"""Containers: OCI images, named by digest, run by podman or Docker with everything walled off.

    engines.py    which engine is there, works and can hold its containers (``find_engine``)
    client.py     one call of an engine's command line
    seccomp.py    which system calls a container may make; pure
    command.py    what is asked of the engine, word by word; pure
    archive.py    an image in a file: what is in it, checked before an engine sees it
    image.py      how the engine gets an image: has it, loads it, pulls it (``bring_image``)
    verdict.py    how a job ended, from what the engine says; pure
    run.py        one job: a container from its start to its removal
    cargo.py      the node's side: jobs over slots (``open_container_cargo``, ``remove_leftovers``)

A container lives for one job: created, started with the input on stdin, read through one pipe, removed by force. It gets nothing of the
host but a seed, ``CARGO_SEED`` (32 hex digits), in its environment.
"""
