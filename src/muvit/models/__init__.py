"""Models: built from parts, each with its config; they know no files but their own folder."""
