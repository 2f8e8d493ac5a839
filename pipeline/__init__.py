"""The way of one update, in the order it travels: core, delta, windows, log, bus."""
