"""Public data sets as downloaded: the module ``<name>`` has ``find_<name>``, which finds slides; `prepare` converts them."""
