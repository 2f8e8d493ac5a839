"""The protocol as sans-I/O state machines: events in, commands out.

No torch, no asyncio, no clock, no randomness: times, names and incarnations are arguments. All
that changes the state of the protocol is in this package.
"""
