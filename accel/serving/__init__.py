"""An images server whose requests share calls of the UNet, step by step. Start: `accel.serving.app.create`."""
