"""sparsecast: lossless sparse weight sync for online RL."""
