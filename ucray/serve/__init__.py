"""The gateway: archives over HTTP as plain zarr and neuroglancer precomputed, for viewers without ucray."""
