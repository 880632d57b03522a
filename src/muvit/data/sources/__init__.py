"""Public data sets as they are downloaded: one module for each, which finds its slides; `prepare` converts them."""
