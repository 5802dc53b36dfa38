"""What people watch of a training: figures, monitors, trackers, cards."""
