"""Pictures and an interactive page of what a CrossFormer computes for an image."""
