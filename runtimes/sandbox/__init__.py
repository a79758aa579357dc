"""The sandbox of native runtimes: what a program may use (tiers), and the walls round it (namespaces, seccomp, limits, a supervisor).

    sandbox = probe()                                     # once, at start: what works here, and the reason in words
    tier = tier_of(cargo.trust_level, cargo.runtime)
    async with open_sandboxed(Program(command, reads), tier, sandbox) as box:
        await box.stream.send_all(...)                    # the program has the other end as descriptor CONTROL_FD
        code = await box.wait()                           # box.overrun says why, where it was ended

Leaving the block ends the whole tree of processes and proves it. The names are in ``probe``, ``tiers``, ``command`` and ``box``; nothing
is imported here, since the program that starts in the sandbox imports this package too and has little to import with.
"""
