"""Work of many jobs that outlives its client and its Coordinator: the board that begins, adopts, cancels and ends runs. What a kind of run
does is its runner's business (coordinator/batches, coordinator/workflows)."""
