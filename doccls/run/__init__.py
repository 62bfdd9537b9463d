"""The contents of a run folder: paths, fingerprint, provenance, metrics, heartbeats, fold ownership."""
