"""Below everything: what a file system does at once. `accel.files` is what the others use."""
