"""Read a pretrained model from disk and trust nothing it says."""
