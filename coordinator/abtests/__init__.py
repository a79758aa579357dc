"""A/B tests: which version of a Cargo a request gets, what is counted, and when the evidence is in."""
