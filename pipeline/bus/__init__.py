"""The bus: its contract, NATS, the embedded broker, the journal and the lease of a run."""
