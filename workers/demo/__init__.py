"""The demo: real reinforcement learning on two cores, its weights followed by real workers."""
