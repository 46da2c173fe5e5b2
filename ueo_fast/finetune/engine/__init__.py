"""The training loop and all that keeps it going: precision, checkpoints, logs, monitors."""
