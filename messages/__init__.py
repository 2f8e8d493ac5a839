"""The wire: every message, the manifest, the subjects, the errors, and the one codec."""
