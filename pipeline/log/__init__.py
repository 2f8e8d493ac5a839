"""The log: durable patches and anchors, for whoever missed the window."""
