"""What peers say to one another: messages, their bytes, who signed them and in which order they may come.

Nothing in this package opens a socket, reads a clock or draws a random number: time, keys and chance are arguments, so the same
code runs in production, in table tests and in the simulator.
"""
