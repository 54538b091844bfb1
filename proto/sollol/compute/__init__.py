"""Sizes of llama.cpp's compute buffers, by rehearsing its graph and its allocator. Start at `device`."""
