"""Models as files and as torch modules: sources, single files, weights, LoRA, topologies, wrappers for export."""
