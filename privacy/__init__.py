"""Keys and, in later steps, sealed sessions, attestation and privacy accounting. No IO: bytes in, bytes out."""
