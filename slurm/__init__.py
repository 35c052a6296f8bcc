"""Where submitting to Slurm, requeueing and watching go: may import pipeline/ only. Empty so far."""
