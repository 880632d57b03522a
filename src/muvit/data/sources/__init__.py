"""Public data sets as downloaded: one module per data set finds its slides; `prepare` converts them."""
