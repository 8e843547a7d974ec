"""The codec: chunks of voxels to bytes and back."""
