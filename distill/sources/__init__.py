"""Where training images come from: folders, webdataset shards, Hugging Face datasets, digits."""
