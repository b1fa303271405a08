"""Code that runs on the GPU (or in Triton's interpreter). Importing a module of this package needs Triton."""
