"""Plain modules that know tensors only: no files, no training, no geometry beyond coordinates."""
