"""The frozen part of a step, computed once: hidden states below the first adapter, on the device, in CPU memory or on disk."""
